"""The files that a worker of a TPU slice gets: the code, the job's script and its watcher."""

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.job import ENVIRONMENT, MOUNT, ROOT, Job, exports, refuse

# ssh runs this script on every worker, any number of times. The first call of an attempt starts the
# job; later calls wait for it as well. A call for an attempt that has ended returns its exit code.
WATCH = """\
#!/bin/bash
cd "$(dirname "$0")" || exit 1
exec 8> door 9> lock
flock 8  # one watcher at a time
if ! flock --nonblock 9; then
  echo "$1" >> attempts
elif ! { [ -f exit ] && grep -qxF "$1" attempts; }; then
  rm -f exit log pid; touch log; echo "$1" > attempts
  cp run.sh running.sh  # bash reads running.sh while the next watcher overwrites run.sh
  # The job inherits the lock (9) and holds it until it ends.
  setsid nohup bash running.sh > log 2>&1 < /dev/null 8>&- &
  echo $! > pid
fi
exec 8>&- 9>&-
while [ ! -s pid ]; do sleep 0.1; done
tail -n +1 -f -s 0.2 --pid="$(cat pid)" log
exit "$(cat exit 2> /dev/null || echo 1)"
"""
# gcsfuse mounts buckets as directories (docs.cloud.google.com/storage/docs/cloud-storage-fuse). It
# must not inherit the lock of watch.sh (9).
GCSFUSE = """\
if ! command -v gcsfuse > /dev/null; then
  source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsS $source/doc/apt-key.gpg | sudo tee $key > /dev/null
  echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
fi
mount_bucket() {
  mountpoint -q MOUNT/$1 && return
  sudo mkdir -p MOUNT/$1 && sudo chown $USER MOUNT/$1 &&
    gcsfuse --implicit-dirs $1 MOUNT/$1 9>&-
}
""".replace("MOUNT", MOUNT)
# Failures before the job itself count as temporary, whatever their exit code.
TRAP = """\
here="$PWD" failed=1
trap 'code=$?; [ $code -eq 0 ] || code=${failed:-$code}; echo $code > "$here/exit"' EXIT
set -e"""


def run_script(job: Job) -> str:
    """The script that a worker runs in ~/NAME; it writes the exit code to the file `exit`.

    It unpacks the code, mounts the buckets, installs the package and runs the job.
    """
    mounts = [GCSFUSE.rstrip(), *(f"mount_bucket {bucket}" for bucket in job.buckets)]
    lines = [
        "#!/bin/bash",
        TRAP,
        *exports(job.environment),
        "if [ -f secrets.sh ]; then . ./secrets.sh; fi",
        "mkdir -p code && tar -xzf code.tar.gz -C code && cd code",
        *(mounts if job.buckets else []),
        job.install.rstrip(),
        f'export PATH="$HOME/{ENVIRONMENT}/bin:$PATH"',
        "failed=",
        shlex.join(job.command("python")),
    ]
    return "\n".join(lines) + "\n"


def watch_command(job: Job, attempt: str) -> str:
    """The command that starts or watches an attempt on a worker."""
    return f"bash {job.name}/watch.sh {attempt}"


def files(job: Job) -> list[str]:
    """Names of the files that a worker gets."""
    return ["code.tar.gz", "run.sh", "watch.sh", *(["secrets.sh"] if job.secrets else [])]


@contextlib.contextmanager
def written(job: Job) -> Iterator[Path]:
    """A directory with the files, readable by this user only; it is deleted afterwards."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with open(directory / "code.tar.gz", "wb") as file:
            command = ["git", "archive", "--format=tar.gz", "HEAD"]
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True)
        refuse(done, "git archive")
        (directory / "run.sh").write_text(run_script(job))
        (directory / "watch.sh").write_text(WATCH)
        if job.secrets:
            path = directory / "secrets.sh"
            path.touch(mode=0o600)
            lines = [f"export {name}={shlex.quote(os.environ[name])}" for name in job.secrets]
            path.write_text("\n".join(lines) + "\n")
        yield directory
