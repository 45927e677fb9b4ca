import sys

from benchmarks.kernels.run import main

sys.exit(main())
