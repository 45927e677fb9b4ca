import sys

from benchmarks.data.run import main

sys.exit(main())
