"""Commands in this process."""

from collections.abc import Sequence

from deco_scale.cli.main import main


def deco(arguments: Sequence[str]) -> int:
    """Exit code of ``deco``, whether ``main`` returns it or argparse exits with it."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
