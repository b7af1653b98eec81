"""Process setup that must precede the import of PyTorch; each script imports it first."""

import gc
import os
import signal

# If a standard stream is closed, the next opened file would get its descriptor and PyTorch's
# output. Writing to this read-only placeholder fails, as to the closed stream.
for number in range(3):
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDONLY)

# Imported objects live to the end; looking for garbage among them takes a tenth of the import.
gc.disable()  # until `running.run_script`

# Scripts plot to files only. When started from a notebook, they inherit its backend; if that is not
# installed here, importing matplotlib would fail.
os.environ["MPLBACKEND"] = "agg"

# Until `running.run_script` installs its handlers, signals exit silently.
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if not hasattr(signal, name):  # SIGHUP on Windows
        continue
    number = getattr(signal, name)
    if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and a shell's & ignore signals
        signal.signal(number, lambda number, _: os._exit(128 + number))
