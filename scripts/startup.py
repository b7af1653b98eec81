"""Imported first by a script that is run: what must be in place before PyTorch is imported."""

import os
import signal

# A closed standard stream would lend its number to the next file that is opened, and what PyTorch
# prints would land in there. Writing to this placeholder fails, as to the closed stream.
for number in range(3):
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDONLY)

# Scripts draw into files only. Started from a notebook, they inherit the notebook's backend, which
# need not be installed here: matplotlib would refuse to be imported.
os.environ["MPLBACKEND"] = "agg"

# Until `command_line.run_script` takes over there is nothing to keep and nothing to say.
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if not hasattr(signal, name):  # SIGHUP on Windows
        continue
    number = getattr(signal, name)
    if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & have it
        signal.signal(number, lambda number, _: os._exit(128 + number))
