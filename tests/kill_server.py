"""Runs the command line in forked children and kills them: a process with torch loaded starts a run in milliseconds.

One JSON line in: {"argv": […], "kill": seconds or null}. One out: {"code": exit code or -signal, "seconds": …,
"error": what it wrote to stderr}.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time


def child(argv, error):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(error, 2)
    code = 70
    with contextlib.suppress(BaseException):
        code = cli.main(argv)
    sys.stderr.flush()
    os._exit(code)


def serve():
    for line in sys.stdin:
        command = json.loads(line)
        with tempfile.TemporaryFile() as error:
            began = time.monotonic()
            pid = os.fork()
            if not pid:
                child(command["argv"], error.fileno())
            done = status = 0
            while not done:
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and command["kill"] is not None and time.monotonic() - began >= command["kill"]:
                    os.kill(pid, signal.SIGKILL)
                    done, status = os.waitpid(pid, 0)
                time.sleep(0.001)
            seconds = time.monotonic() - began
            error.seek(0)
            report = {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "error": error.read().decode()}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot

    from finetune import cli
    from finetune.runs import registry
    from finetune.runs.run import torch_settings

    with torch_settings(threads=1):  # imports much, which no child has to do again then
        pass
    for module in sys.argv[1:]:
        registry.load(registry.find(module))
    serve()
