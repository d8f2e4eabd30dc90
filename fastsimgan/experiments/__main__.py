"""`python -m fastsimgan.experiments NAME`: the experiments by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastsimgan import cli

EXPERIMENTS = {
    "gaze": "§3.1.3: do gaze networks trained on refined eyes do better on real ones?",
    "hand": "§3.2: do pose networks trained on refined depth hands do better on real ones?",
    "ablation-local": "Fig. 8: the local adversarial loss against the global one, in numbers",
    "ablation-history": "Fig. 9: a history of refined images against none, in numbers",
}
MODULES = {"ablation-local": "ablation", "ablation-history": "ablation"}  # of a name that is not its module's own


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to the experiment that the first one names; return the exit code."""
    return cli.exit_code(lambda: _named(argv))


def _named(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in EXPERIMENTS:
        name = arguments[0]
        module = importlib.import_module(f"fastsimgan.experiments.{MODULES.get(name, name)}")
        code: int = module.main(arguments[1:], name) if name in MODULES else module.main(arguments[1:])
        return code
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"error: the experiment must be one of {', '.join(EXPERIMENTS)}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    print("python -m fastsimgan.experiments NAME --help\n")
    for name, what in EXPERIMENTS.items():
        print(f"  {name:<18}{what}")
    return 0 if arguments else 2


if __name__ == "__main__":
    sys.exit(main())
