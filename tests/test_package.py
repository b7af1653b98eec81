import subprocess
import sys

LIGHT = """
import sys, torch
before = set(sys.modules)
import nnce
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"nnce", "torch"}))
"""


def test_import_nnce_imports_torch_and_nothing_else():
    found = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
