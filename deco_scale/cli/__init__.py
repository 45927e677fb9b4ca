"""The ``deco`` command, one module per subcommand."""
