"""Runs specs x candidates x peers side by side: `attnplan bench` from a checkout.

python -m bench.harness examples/longnet.toml --device cpu --output bench/results/longnet-cpu-bench.json
"""

import sys

from attnplan.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
