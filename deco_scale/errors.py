"""The two ways in which a command ends badly, with their exit codes."""


class ConfigError(ValueError):
    """Wrong use or configuration: nothing was started. Exit code 2."""

    exit_code = 2


class Damaged(ConfigError):
    """A file is not what was written: incomplete, or its checksum is another."""


class RunError(RuntimeError):
    """The run failed for a reason that has a name. Exit code 1."""

    exit_code = 1


class Stopped(Exception):
    """A signal ended the run, after a checkpoint."""
