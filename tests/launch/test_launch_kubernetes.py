"""The Kubernetes files against the generated schema and in themselves, and the image's recipe.

No cluster and no image builder is asked.
"""

import re
import shlex
import typing
from pathlib import Path

import pytest
import yaml
from fake_tools import ROOT, Tools, give_venv, make_project

NANO = "configs/nano_frozen_lake.py"


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path)


@pytest.fixture
def tools(tmp_path) -> Tools:
    return Tools(tmp_path / "tools")


def as_tpu(text: str) -> str:
    """The edit that launch/jobset.yaml itself describes."""
    kept = [line for line in text.splitlines() if not line.endswith("# gpu")]
    return "\n".join(kept).replace("#tpu ", "")


def load_jobset(kind: str) -> dict:
    text = (ROOT / "launch" / "jobset.yaml").read_text()
    sed = re.search(r"sed (-e '.*?') (-e '.*?') launch", text)
    assert sed.groups() == ("-e '/# gpu$/d'", "-e 's/#tpu //'")
    return yaml.safe_load(as_tpu(text) if kind == "tpu" else text)


def problems(annotation: object, value: object, path: str = "") -> list[str]:
    """Where a document leaves its schema: unknown or missing fields, wrong types.

    Args:
      annotation: a type of the generated Kubernetes models.
      value: what YAML has at `path`.
    """
    pydantic = pytest.importorskip("pydantic")
    inner = typing.get_args(annotation)
    if type(None) in inner:  # Optional
        return problems(next(a for a in inner if a is not type(None)), value, path)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return problems(inner[0], value, path)
    if origin is list:
        items = enumerate(value) if isinstance(value, list) else [(0, value)]
        found = [] if isinstance(value, list) else [f"{path}: is no list"]
        return found + [p for i, item in items for p in problems(inner[0], item, f"{path}[{i}]")]
    if origin is dict:
        return [p for k, v in value.items() for p in problems(inner[1], v, f"{path}.{k}")]
    name = getattr(annotation, "__name__", "")
    if name.endswith(("Quantity", "IntOrString")):
        return [] if type(value) in (int, str) else [f"{path}: {value!r} is no quantity"]
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no object"]
        fields = {f.alias or n: f for n, f in annotation.model_fields.items()}
        found = [f"{path}.{key}: unknown field" for key in value if key not in fields]
        for key, field in fields.items():
            if key in value:
                found += problems(field.annotation, value[key], f"{path}.{key}")
            elif field.is_required():
                found.append(f"{path}.{key}: missing")
        return found
    strict = pydantic.TypeAdapter(annotation, config={"strict": True})
    try:
        strict.validate_python(value)
    except pydantic.ValidationError:
        return [f"{path}: {value!r} is not {annotation}"]
    return []


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_the_jobset_is_one_by_the_schema(kind):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    jobset = models.JobsetV1alpha2JobSet
    document = load_jobset(kind)
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and document["kind"] == "JobSet"
    assert problems(jobset, document) == []
    # The check does see what is wrong, at any depth.
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["paralelism"] = 2
    job["template"]["spec"]["containers"][0]["env"][0]["value"] = 2
    del job["template"]["spec"]["containers"][0]["name"]
    places = [problem.partition(":")[0] for problem in problems(jobset, document)]
    assert [place.rpartition(".")[2] for place in places] == ["paralelism", "value", "name"]


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_the_jobset_holds_together(kind):
    document = load_jobset(kind)
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert job["completions"] == job["parallelism"] == int(env["OEL_PROCESSES"]["value"]) > 1
    assert job["completionMode"] == "Indexed"
    assert env["OEL_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == index

    # Pod 0's name is JOBSET-JOB-0-0, in the JobSet's headless service of the JobSet's name.
    assert document["spec"]["network"]["enableDNSHostnames"] is True
    host, _, port = env["OEL_COORDINATOR"]["value"].partition(":")
    assert host == f"$(JOBSET_NAME)-{replicated['name']}-0-0.$(JOBSET_NAME)"
    assert int(port) == container["ports"][0]["containerPort"]
    order = list(env)  # a variable can only be used after it is defined
    assert order.index("JOBSET_NAME") < order.index("OEL_COORDINATOR")

    rules = job["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {2: "FailJob", 76: "FailJob", 75: "Ignore"}
    assert all(r["onExitCodes"]["containerName"] == container["name"] for r in rules[:2])
    assert rules[2]["onPodConditions"][0] == {"type": "DisruptionTarget", "status": "True"}
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod["terminationGracePeriodSeconds"] >= 120 and pod["securityContext"]["runAsNonRoot"]

    limits = container["resources"]["limits"]
    assert list(limits) == [{"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}[kind]]
    if kind == "tpu":  # all pods together hold the chips of the topology
        chips = 1
        for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
            chips *= int(side)
        assert limits["google.com/tpu"] * job["parallelism"] == chips
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    claim = yaml.safe_load((ROOT / "launch" / "workdir_claim.yaml").read_text())
    assert mounts["/data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert env["WORKDIR"]["value"].startswith("/data/")


def test_the_claim_is_one_by_the_schema():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    claim = yaml.safe_load((ROOT / "launch" / "workdir_claim.yaml").read_text())
    assert (claim.pop("apiVersion"), claim.pop("kind")) == ("v1", "PersistentVolumeClaim")
    assert problems(models.IoK8sApiCoreV1PersistentVolumeClaimTemplate, claim) == []


def test_the_pods_command_runs_as_written(project, tools):
    """What the kubelet makes of command and args, with its $(NAME), on this machine."""
    document = load_jobset("gpu")
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    env |= {"OEL_PROCESS_ID": "1", "JOBSET_NAME": "oel", "WORKDIR": "runs/fl8b"}
    words = [
        re.sub(r"\$\((\w+)\)", lambda name: env[name[1]], word)
        for word in [*container["command"], *container["args"]]
    ]
    give_venv(project)
    ended = tools.bash(f"PATH=.venv/bin:$PATH {shlex.join(words)}", project, MAIN_EXIT="75")
    assert ended.returncode == 75, ended.stderr
    config = next(word for word in words if word.startswith("--config=")).partition("=")[2]
    assert (ROOT / config).is_file()
    log = (project / "runs" / "fl8b" / "logs" / "process-1.log").read_text()
    assert f"main --config={config} --workdir=runs/fl8b --config.compilation_cache=/data/xla" in log


# --- the image ------------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest) of launch/Dockerfile, in order."""
    text = (ROOT / "launch" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_runs_as_a_user_and_copies_what_exists():
    steps = dockerfile()
    (base,) = [rest for name, rest in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base)
    assert not [rest for name, rest in steps if name == "ADD"]
    assert "http" not in (ROOT / "launch" / "Dockerfile").read_text()
    sent = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    for rest in (rest for name, rest in steps if name == "COPY"):
        source, target = rest.split()
        assert (ROOT / source).exists() and not Path(target).is_absolute()
        assert f"!{source.rstrip('/')}" in sent  # or the builder would not find it
    names = [name for name, _ in steps]
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert user == "1000" and names.index("USER") > max(
        i for i, n in enumerate(names) if n == "RUN"
    )
    (pip,) = [rest for name, rest in steps if name == "RUN" and "pip" in rest]
    assert '-r requirements.txt "${JAX}"' in pip and "--no-cache-dir" in pip
    assert names.index("ARG") > names.index("FROM")  # an earlier one is not seen by RUN
    jobset = load_jobset("gpu")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert jobset["spec"]["securityContext"]["runAsUser"] == int(user)


def test_the_image_starts_as_written(project, tools):
    """ENTRYPOINT and CMD, run here in a directory with the files that COPY brings."""
    steps = dict(dockerfile())
    words = [*yaml.safe_load(steps["ENTRYPOINT"]), *yaml.safe_load(steps["CMD"])]
    command = shlex.join(words).replace("/data/", "data/")
    give_venv(project)
    ended = tools.bash(f"PATH=.venv/bin:$PATH {command}", project, MAIN_EXIT="0")
    assert (
        ended.returncode == 0 and f"main --config={NANO} --workdir=data/runs/nano" in ended.stdout
    )
