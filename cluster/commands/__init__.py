"""The sub-commands of `keel`, one file per family. Each has `register(subparsers)`; what it needs it imports when run."""
