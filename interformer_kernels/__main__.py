"""`python -m interformer_kernels`: the command line."""

from interformer_kernels.cli import main

raise SystemExit(main())
