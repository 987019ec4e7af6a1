"""``namesake serve`` as a process of its own, and a handle on it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from namesake.errors import InputError, ServingError
from namesake.messages import tr
from namesake.process import end_with_parent, free_port

Option = str | int | float | bool | os.PathLike[str] | Sequence[str] | None
"""A value of an option: true gives a flag, false and none leave it out, several values give it several times."""

_KILL_SECONDS = 60
_LINES = 20


def command(words: Sequence[str]) -> list[str]:
    """The command line of the server's process."""
    return [sys.executable, "-m", "namesake_serving", *words]


def flags(options: Mapping[str, Option]) -> list[str]:
    """Keyword arguments as the command line has them: ``poll_seconds=1`` is ``--poll-seconds=1``."""
    words: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            words += [f"{flag}={one}" for one in several]
    return words


class Server:
    """A running ``namesake serve``. As a context manager it waits until the server answers, and stops it at the end.

    Running answers are finished when it stops. It is stopped too when the handle is forgotten, when Python ends, and,
    on Linux, when the main thread that started it is killed.

    Attributes:
        url: where the chat page is, ``http://127.0.0.1:8000``.
        base_url: what OpenAI clients take, ``http://127.0.0.1:8000/v1``.
    """

    def __init__(self, version: str = "", *, host: str = "127.0.0.1", port: int = 8000, **options: Option) -> None:
        """Start the process; see :func:`namesake.serve`."""
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        if port and _answers(reached, port):
            raise InputError(
                "port", port, "is taken", mend="Stop what listens there, or give another one; 0 finds one."
            )
        port = port or free_port(host)
        self.url = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
        self.base_url = f"{self.url}/v1"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # it is on this machine
        descriptor, log = tempfile.mkstemp(prefix="namesake-serve-", suffix=".log")
        self._log = Path(log)
        words = flags({**options, "host": host, "port": port})
        self._given = " ".join([*words, *([version] if version else [])])
        # The kernel's signal comes when the starting thread ends, so that it is of use in the main one alone.
        lasting = threading.current_thread() is threading.main_thread()
        try:
            self._process = subprocess.Popen(
                command([*words, "--", version] if version else words),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C here must not cut the answers there
                preexec_fn=end_with_parent if lasting else None,
            )
        except BaseException:
            self._log.unlink()
            raise
        finally:
            os.close(descriptor)
        # As long as the server itself gives running answers, and some time to end its engines.
        grace = options.get("shutdown_timeout") or os.environ.get("NAMESAKE_SERVE_SHUTDOWN_SECONDS") or 30
        self._end = weakref.finalize(self, _stop, self._process, self._log, float(str(grace)) + _KILL_SECONDS)

    @property
    def pid(self) -> int:
        """Process id of the gateway; vLLM is its child."""
        return self._process.pid

    def running(self) -> bool:
        """Whether the process is there; :meth:`wait_ready` says whether it answers."""
        return self._process.poll() is None

    def wait_ready(self, seconds: float = 900) -> Server:
        """Wait until a version answers.

        Raises:
            InputError: the server refuses an option.
            ServingError: it ended, or took longer; the message has the end of its log.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.running():
                raise self._ended()
            with suppress(OSError), self._open(f"{self.url}/ready", timeout=5):
                return self
            time.sleep(0.1)
        raise ServingError(
            tr(
                "Nothing answers at {url} after {seconds} s.\n{log}",
                url=self.url,
                seconds=f"{seconds:.0f}",
                log=self.log(),
            ),
            mend="Wait longer.",
        )

    def log(self, lines: int = _LINES) -> str:
        """The end of what the server has printed; empty once it has been stopped."""
        with suppress(OSError):
            return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        return ""

    def stop(self) -> None:
        """Let running answers finish and end every process of the server. Stopping twice is no error."""
        self._end()

    def __enter__(self) -> Server:
        try:
            return self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Server {self.base_url} {'running' if self.running() else 'stopped'}>"

    def _ended(self) -> ServingError | InputError:
        said = self.log()
        if self._process.returncode == InputError.exit_code:
            fault = tr("is refused\n{log}", log=said)
            return InputError("serve", self._given, fault, mend="See `namesake serve --help`.")
        return ServingError(
            tr("The server ended with exit code {code}.\n{log}", code=self._process.returncode, log=said)
        )


def _stop(process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.unlink(missing_ok=True)


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there: what is asked of our server would go to that one."""
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
