import sys

from benchmarks.checkpoint.save import main

sys.exit(main())
