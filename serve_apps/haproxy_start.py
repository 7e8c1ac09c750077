"""The program that Ray starts as HAProxy: it narrows the config that Ray wrote, and becomes HAProxy.

In: HAProxy's arguments, of which `-f FILE` names the config; `MMLLM_HAPROXY_BINARY` names the program. Ray's config
opens a page of statistics and a page of metrics on every interface, lets every user of the machine command it, sends a
line for each request to the machine's log, and gives callers as long as they like for their headers. Here what asks is
HTTP on the one address that it was told, and nothing else. A config of another shape is refused, so that a Ray
that writes other configs opens nothing unseen. Standard library alone, for it runs at every start and reload.
"""

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

BINARY = "MMLLM_HAPROXY_BINARY"
HEADERS_WITHIN_S = 60
"""That a caller has for the headers of a request."""
_DROPPED_SECTIONS = ("frontend prometheus", "listen stats")
_SECTION = re.compile(r"(global|defaults|frontend|backend|listen)\b")
_PR_SET_PDEATHSIG = 1


class UnknownConfig(Exception):
    """Ray wrote a config of a shape that is not known here."""


def narrowed(config: str) -> str:
    """A config of Ray's, without what others could reach.

    Raises:
        UnknownConfig: it is not of the shape that Ray 2.60 writes.
    """
    kept: list[str] = []
    section = ""
    for line in config.splitlines():
        words = line.strip()
        if _SECTION.match(line):
            section = words
        if section in _DROPPED_SECTIONS or _is_of_logging(words):
            continue
        if words.startswith("stats socket "):
            line = line.replace(" mode 666 ", " mode 600 ")
        # Ray's list of routes is answered by replicas, as any other path that is not offered.
        if words.startswith("http-request return ") and words.endswith(" if routes"):
            continue
        kept.append(line)
        if line == "defaults":
            kept.append(f"    timeout http-request {HEADERS_WITHIN_S}s")
    _require_narrow(kept)
    return "\n".join(kept) + "\n"


def _is_of_logging(words: str) -> bool:
    return words.startswith(("log ", "log-format", "option httplog", "option log-health-checks")) or words == "no log"


def _require_narrow(lines: list[str]) -> None:
    words = [line.strip() for line in lines]

    def found(start: str) -> list[str]:
        return [line for line in words if line.startswith(start)]

    wanted = {
        "one address": len(found("bind ")) == 1,
        "one frontend": found("frontend ") == ["frontend http_frontend"] and not found("listen "),
        "one socket for commands": len(found("stats ")) == 2 and " mode 600 " in (found("stats socket ") or [""])[0],
        "one section of defaults": words.count("defaults") == 1,
        "no list of routes": not any(
            "routes_message" in line or line.endswith("if routes") for line in found("http-request return")
        ),
    }
    if lacking := [what for what, is_so in wanted.items() if not is_so]:
        raise UnknownConfig(f"HAProxy's config is not as Ray 2.60 writes it: {', '.join(lacking)} was expected")


def main() -> None:
    """Narrow the config where it lies, and become HAProxy."""
    arguments = sys.argv[1:]
    file = Path(arguments[arguments.index("-f") + 1])
    try:
        file.write_text(narrowed(file.read_text(encoding="utf-8")), encoding="utf-8")
    except UnknownConfig as error:
        sys.exit(str(error))
    # It would hold the address for ever if the process that commands it was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    binary = os.environ[BINARY]
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
