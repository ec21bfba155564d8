"""`python -m rayjobs`."""

from rayjobs.cli import main

raise SystemExit(main())
