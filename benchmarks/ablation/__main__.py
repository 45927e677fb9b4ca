import sys

from benchmarks.ablation.run import main

sys.exit(main())
