#!/usr/bin/env python3
"""Runs rdma-core's own tests (python3-pyverbs), each in a process of its own with a time limit.

usage: pyverbs_suite.py --dev NAME [--gid N] [--port N] [--limit SECONDS] [--rounds N] [--list] [PART_OF_A_NAME...]

One line for each test, "result WORD SECONDS NAME: REASON" with WORD one of ok, fail, error, skip, crash, timeout, hung;
at the end one line with the sums. Exit code 0: nothing but ok and skip.
"""

import argparse
import collections
import importlib.util
import json
import os
import select
import signal
import sys
import time
import unittest

PLACE = "/usr/share/rdma-core/tests"


def load(options):
    """The tests, found the way that their own runner does it."""
    sys.path.insert(0, PLACE)
    from args_parser import parser

    rest = sys.argv
    sys.argv = [rest[0], "--dev", options.dev, "--port", str(options.port)]
    if options.gid is not None:
        sys.argv += ["--gid", str(options.gid)]
    parser.parse_args()
    sys.argv = rest
    spec = importlib.util.spec_from_file_location(
        "tests", f"{PLACE}/__init__.py", submodule_search_locations=[PLACE]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["tests"] = package
    spec.loader.exec_module(package)
    return list(flat(unittest.defaultTestLoader.loadTestsFromModule(package)))


def flat(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


def last_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def verdict(test):
    """Runs it here; the word and the reason."""
    result = unittest.TestResult()
    test.run(result)
    if result.errors:
        return "error", result.errors[0][1]
    if result.failures:
        return "fail", result.failures[0][1]
    if result.unexpectedSuccesses:
        return "fail", "passes, but is expected to fail"
    if result.skipped:
        return "skip", result.skipped[0][1]
    return "ok", ""


def in_child(test, limit):
    """Runs it in a child. What it leaves open is closed by the kernel, and nothing is collected at the end."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(reader)
        quiet = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)
        try:
            word, reason = verdict(test)
        except BaseException as error:  # a SystemExit of a test, for example
            word, reason = "error", repr(error)
        data = json.dumps([word, reason]).encode()
        while data:
            data = data[os.write(writer, data) :]
        os._exit(0)
    os.close(writer)
    data = b""
    ended = False
    while not ended:
        left = begin + limit - time.monotonic()
        ready, _, _ = select.select([reader], [], [], max(left, 0))
        if not ready:
            break
        piece = os.read(reader, 65536)
        data += piece
        ended = not piece
    os.close(reader)
    took = time.monotonic() - begin
    if not ended:
        # The test's own children have its session, too.
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return ("timeout" if gone(pid, 20) else "hung"), f"no end within {limit} s", took
    if not gone(pid, 20):
        return "hung", "its process does not end", took
    try:
        word, reason = json.loads(data)
    except ValueError:
        return "crash", "its process was killed", took
    return word, reason, took


def gone(pid, seconds):
    """Whether a child ends within that time: one that hangs in the kernel never does."""
    # A process' own descriptor becomes readable when it ends.
    fd = os.pidfd_open(pid)
    ready, _, _ = select.select([fd], [], [], seconds)
    os.close(fd)
    if not ready:
        return False
    os.waitpid(pid, 0)
    return True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dev", required=True)
    parser.add_argument("--port", type=int, default=1)
    parser.add_argument("--gid", type=int)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    tests = load(options)
    if options.names:
        tests = [t for t in tests if any(name in t.id() for name in options.names)]
    if options.list:
        for test in tests:
            print(test.id())
        return 0
    sums = collections.Counter()
    begin = time.monotonic()
    for _ in range(options.rounds):
        for test in tests:
            word, reason, took = in_child(test, options.limit)
            sums[word] += 1
            print(f"result {word} {took:.2f} {test.id()}: {last_line(reason)}", flush=True)
            if word not in ("ok", "skip"):
                for line in reason.rstrip().splitlines():
                    print(f"  | {line}", flush=True)
    words = ("ok", "fail", "error", "skip", "crash", "timeout", "hung")
    text = " ".join(f"{word}={sums[word]}" for word in words)
    print(f"sum tests={sum(sums.values())} {text} seconds={time.monotonic() - begin:.0f}", flush=True)
    return 0 if sum(sums.values()) == sums["ok"] + sums["skip"] > 0 else 1


sys.exit(main())
