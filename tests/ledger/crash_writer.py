"""Run as a program: writes to a ledger until it is killed, and tells through its output what was acknowledged.

A line is written only after the ledger has acknowledged: `hold ID`, `settled ID`, `plain ID`.
"""

import asyncio
import itertools
import os
import sys

from thrifty.budget import Account, Budget
from thrifty.ledger import Labels, open_ledger
from thrifty.spend import Spend

ASK, ACTUAL = Spend(input=100, output=50, calls=1), Spend(input=100, output=7, calls=1)


async def main(path: str, name: str) -> None:
    ledger = open_ledger(path, key=b"k" * 32)
    account = Account("root", Budget(calls=10**9), ledger=ledger).child("child", Budget(output=10**12))
    numbers = itertools.count()
    parked = account.hold(ASK, labels=Labels(method=f"{name}-parked"), durable=True)  # open whenever the kill comes
    os.write(1, f"hold {parked.labels.method}\n".encode())

    async def remote(lane: int) -> None:
        for i in numbers:
            label = f"{name}-{lane}-{i}"
            hold = account.hold(ASK, labels=Labels(method=label), durable=True)
            os.write(1, f"hold {label}\n".encode())
            await asyncio.sleep(0.001)
            await hold.settle_async(ACTUAL)
            os.write(1, f"settled {label}\n".encode())

    async def local(lane: int) -> None:
        for i in numbers:
            label = f"{name}-{lane}-{i}"
            await account.hold(ASK, labels=Labels(method=label)).settle_async(ACTUAL)
            os.write(1, f"plain {label}\n".encode())

    await asyncio.gather(*(remote(n) for n in range(4)), *(local(n) for n in range(4, 24)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
