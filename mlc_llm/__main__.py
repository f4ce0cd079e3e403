"""`python -m mlc_llm` is the console script `mlc_llm`."""

import sys

from mlc_llm.cli.main import main

sys.exit(main())
