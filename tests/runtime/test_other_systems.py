"""Nothing that only Unix has is needed to import the package or for a plain run.

Windows and macOS are not at hand: a child process hides what they lack. Libraries are imported before, since on this
system they use what is hidden.
"""

from __future__ import annotations

from pathlib import Path

from children import forget, in_child

HIDE_UNIX = """
import os, signal, stat, sys

import accelerate, filelock, numpy, PIL.Image, psutil, rich.progress, safetensors.torch, torch, typer
import torch.distributed, torch.utils.data

for name in MODULES:
    sys.modules[name] = None  # an import raises ModuleNotFoundError
for name in OS_NAMES:
    vars(os).pop(name, None)
for name in SIGNAL_NAMES:
    vars(signal).pop(name, None)

real_open = os.open

def open_as_on_windows(path, *arguments, **settings):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *arguments, **settings)

os.open = open_as_on_windows
"""
MODULES = ["resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"]
OS_NAMES = [
    *("fork", "forkpty", "wait4", "WNOHANG", "killpg", "getpgid", "setsid", "nice", "getloadavg", "sysconf", "confstr"),
    *("getuid", "geteuid", "getgid", "getegid", "getgroups", "setuid", "chown", "fchown", "fchmod", "chroot", "mkfifo"),
    *("pread", "preadv", "pwritev", "readv", "writev", "sendfile", "statvfs", "fstatvfs", "uname", "sched_getaffinity"),
    *("posix_fallocate", "posix_fadvise", "fdatasync", "sync", "lockf", "openpty", "ttyname", "register_at_fork"),
    *("O_DIRECTORY", "O_SYNC", "O_DSYNC", "O_NOCTTY", "O_TMPFILE", "O_PATH"),
]
SIGNAL_NAMES = [
    *("SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGTSTP", "SIGCONT"),
    *("SIGSTOP", "SIGWINCH", "alarm", "setitimer", "pthread_sigmask", "pause", "sigwait", "siginterrupt"),
]

RUN = """
import importlib, pkgutil
from pathlib import Path

import undiffuse
from undiffuse.sampling.sampler import Sampler

for module in pkgutil.walk_packages(undiffuse.__path__, "undiffuse."):
    if module.name != "undiffuse.__main__":
        importlib.import_module(module.name)

import tiny_run

folder = Path(FOLDER)
numpy.save(folder / "data.npy", tiny_run.data().values[:])
data = undiffuse.load_data(folder / "data.npy", num_values=5)
recipe = tiny_run.recipe(max_steps=4, conditional=False, save_minutes=1e-6)
run = tiny_run.train(recipe, folder / "run", data)
model = undiffuse.load(run)
assert model.sample(2, sampler=Sampler(num_steps=2)).shape == (2, 1, 4, 4)
assert list((run / "checkpoints").glob("step-*")), "no checkpoint"
undiffuse.save(model, folder / "copy.safetensors")
"""


def hidden_run(folder: Path) -> None:
    forget("undiffuse", "tiny_run")
    names = {"MODULES": MODULES, "OS_NAMES": OS_NAMES, "SIGNAL_NAMES": SIGNAL_NAMES, "FOLDER": str(folder)}
    exec(HIDE_UNIX + RUN, names)


def test_a_run_needs_nothing_that_only_unix_has(tmp_path):
    in_child(lambda: hidden_run(tmp_path), seconds=300)
    assert (tmp_path / "copy.safetensors").is_file()
