"""One rank of a run in which one fails while the others' main threads are blocked: `blocked.py RANK HOW [SILENT_S]`.

`RANK` is the one; `HOW` is `error` (a mistake of the user's), `interrupted`, `killed` or `leaves`. The others are in a
call that does not notice, as in a kernel of NCCL's.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from tagi_ds.engine import distributed, watch

BLOCKED_S = 100


def main() -> None:
    failing, how = int(sys.argv[1]), sys.argv[2]
    ranks = distributed.start(60)
    distributed.at("step 7")
    distributed.barrier()
    assert distributed._watch is not None
    if len(sys.argv) > 3:
        distributed._watch.silent_s = watch._STORE_GONE_S = float(sys.argv[3])
    if ranks.rank != failing:
        print("blocked", flush=True)
        time.sleep(BLOCKED_S if how != "leaves" else 6)
        distributed.leave()
    # Every watch has given a sign at this place.
    time.sleep(2)
    if how == "error":
        distributed.end(2, "error: the memory does not suffice")
    if how == "interrupted":
        distributed.end(130, "interrupted", finishing=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.leave()


if __name__ == "__main__":
    main()
