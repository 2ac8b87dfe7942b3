"""A worker of a crew that sleeps where a real one works: ``python fake_worker.py PLAN.json``; imports nothing slow.

The plan says what takes how long, in seconds: ``starting``, and by spec ``planning``, ``preparation``, ``contestants``
and ``race``. A contestant is a name and its steps, each [what, key, seconds]: ``device``; ``once``, on the device, once
in a process for each key; or ``compile``, off the device, once for each key among all processes that share the folder
``cache``. What used the device goes to ``log``, as [begin, end, what] by the monotonic clock.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

plan: dict[str, Any] = {}
known: set[str] = set()


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def ask(name: str, size: int = 1, keeps: int = 0) -> None:
    say({"asks": name, "size": size, "keeps": keeps})
    if not sys.stdin.readline():
        sys.exit()


def use(what: str, seconds: float) -> None:
    begin = time.monotonic()
    time.sleep(seconds)
    with Path(plan["log"]).open("a", encoding="utf-8") as log:
        log.write(json.dumps([begin, time.monotonic(), what]) + "\n")


def step(contestant: str, what: str, key: str, seconds: float) -> None:
    if what == "device":
        use("check", seconds)
    elif what == "once":
        if key not in known:
            use("check", seconds)
    elif key not in known:
        made = Path(plan["cache"]) / key
        say({"leaves": "a compiler", "keeps": 0})
        if not made.exists():
            time.sleep(seconds)
            made.touch()
        ask(contestant)
    known.add(key)


def main() -> None:
    plan.update(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    time.sleep(random.Random(os.getpid()).uniform(*plan["starting"]))
    say({"hello": {"device": "fake", "versions": {}}, "memory": 1000})
    for line in sys.stdin:
        job = json.loads(line)
        spec = plan["specs"][job["spec"]]
        until = time.monotonic() + job["left"]
        time.sleep(spec["planning"])
        ask("its preparation", spec["preparation bytes"])
        use("check", spec["preparation"])
        rows = []
        for name, steps in spec["contestants"]:
            if time.monotonic() < until:
                ask(name, spec["bytes"].get(name, 1))
                for one in steps:
                    step(name, *one)
                rows.append({"spec": job["spec"], "mode": "forward", "candidate": name, "seconds": 1e-3})
        ask("the race")
        use("race", spec["race"] * len(rows) / max(1, len(spec["contestants"])))
        say({"rows": rows, "keeps": 0})


if __name__ == "__main__":
    main()
