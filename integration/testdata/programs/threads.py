"""Threads that hand numbers through a queue, a generator half-way, an open
file and a dictionary with known contents; reports like the C programs."""
import hashlib
import os
import queue
import threading
import time

report = os.open("/out/python", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
scratch = open("/out/python.data", "w+b", buffering=0)
numbers = queue.Queue(maxsize=4)
table = {i: hashlib.sha256(str(i).encode()).hexdigest() for i in range(20000)}


def say(text):
    os.write(report, (text + "\n").encode())


def fail(text):
    say("FAIL " + text)
    os._exit(99)


def produce():
    n = 0
    while True:
        numbers.put(n)
        n += 1
        time.sleep(0.01)


def squares():
    n = 0
    while True:
        yield n * n
        n += 1


def sleep_on_time():
    while True:
        start = time.monotonic()
        time.sleep(0.3)
        if time.monotonic() - start < 0.3:
            fail("sleep(0.3) was short")


def check(n, square):
    if numbers.get(timeout=30) != n:
        fail("the queue lost its order at %d" % n)
    if square != n * n:
        fail("the generator lost its place at %d" % n)
    key = n % len(table)
    if table[key] != hashlib.sha256(str(key).encode()).hexdigest():
        fail("table[%d] changed" % key)
    scratch.write(b"%8d" % n)
    if scratch.tell() != 8 * (n + 1):
        fail("the file is at %d" % scratch.tell())


threading.Thread(target=produce, daemon=True).start()
threading.Thread(target=sleep_on_time, daemon=True).start()
for round_no, square in enumerate(squares()):
    try:
        check(round_no, square)
    except Exception as error:
        fail(repr(error))
    say(str(round_no + 1))
