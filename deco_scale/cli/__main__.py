"""Runs the ``deco`` command as ``python -m deco_scale.cli``, under ``torchrun`` and ``deepspeed`` as well."""

import sys

from deco_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
