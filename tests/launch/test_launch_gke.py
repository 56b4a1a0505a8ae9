"""The JobSet for Google Kubernetes Engine, and the image that it runs."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ("configs/tinyclip.py", "--workdir=gs://bucket/run")


@pytest.fixture
def filled(launches):
  def fill(*arguments, **environment):
    done = launches.run(
      "gke_jobset.sh", "--dry-run", *arguments, IMAGE="registry/image:1", **environment
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)

  return fill


def test_a_v5e_slice_of_16_chips(filled):
  jobset = filled(*RECIPE, '--config.name=a: "b" $(HOME)')
  assert (jobset["apiVersion"], jobset["kind"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
  )
  assert jobset["metadata"]["name"] == "gcl-jax"
  assert jobset["spec"]["network"]["enableDNSHostnames"] is True
  (workers,) = jobset["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  assert (job["parallelism"], job["completions"]) == (4, 4)
  assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
  assert pod["terminationGracePeriodSeconds"] == 120
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  (train,) = pod["containers"]
  assert train["image"] == "registry/image:1"
  assert train["command"] == ["python", "-m", "gcl_jax.train"]
  assert train["args"] == [
    "--distributed",
    "--config=configs/tinyclip.py",
    "--workdir=gs://bucket/run",
    '--config.name=a: "b" $$(HOME)',
  ]
  assert train["resources"]["limits"] == {"google.com/tpu": 4}
  assert train["resources"]["requests"] == train["resources"]["limits"]
  mounts = {mount["name"] for mount in train["volumeMounts"]}
  assert mounts == {volume["name"] for volume in pod["volumes"]}


def action(jobset, failure: str) -> str:
  """What JobSet does with a job of which a pod so failed, by its documented rules."""
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  reason, message = (
    "BackoffLimitExceeded",
    "Job has reached the specified backoff limit",
  )
  for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
    assert rule["action"] == "FailJob"
    tail = f"matching FailJob rule at index {index}"
    codes = rule.get("onExitCodes")
    if codes and failure.isdigit() and int(failure) in codes["values"]:
      assert codes["operator"] == "In"
      assert codes["containerName"] == container["name"]
      reason, message = (
        "PodFailurePolicy",
        f"Container train for pod default/x failed with exit code {failure} {tail}",
      )
      break
    conditions = [c["type"] for c in rule.get("onPodConditions", [])]
    if failure in conditions:
      reason, message = (
        "PodFailurePolicy",
        f"Pod default/x has condition {failure} {tail}",
      )
      break
  for rule in jobset["spec"]["failurePolicy"]["rules"]:
    if reason in rule["onJobFailureReasons"] and any(
      re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]
    ):
      return rule["action"]
  return "RestartJobSet"


@pytest.mark.parametrize(
  ("failure", "expected"),
  [
    ("2", "FailJobSet"),
    ("75", "RestartJobSetAndIgnoreMaxRestarts"),
    ("DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
    ("1", "RestartJobSet"),
    ("137", "RestartJobSet"),
    ("22", "RestartJobSet"),
  ],
)
def test_what_becomes_of_a_failure(filled, failure, expected):
  jobset = filled(*RECIPE, MAX_RESTARTS="7")
  assert action(jobset, failure) == expected
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7


@pytest.mark.parametrize(
  ("topology", "chips", "hosts"),
  [("2x4", "8", 1), ("16x16", "4", 64), ("4x4x8", "4", 32)],
)
def test_hosts_follow_from_the_topology(filled, topology, chips, hosts):
  jobset = filled(*RECIPE, TOPOLOGY=topology, CHIPS=chips)
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert (job["parallelism"], job["completions"]) == (hosts, hosts)


def test_it_is_submitted_as_it_is_printed(launches):
  launches.stub("kubectl", '#!/bin/sh\necho "$@" >>$JOURNAL\ncat >$STUBS/submitted\n')
  printed = launches.run("gke_jobset.sh", "--dry-run", *RECIPE, IMAGE="i").stdout
  assert launches.run("gke_jobset.sh", *RECIPE, IMAGE="i").returncode == 0
  assert launches.journal() == ["create -f -"]
  assert (launches.folder / "submitted").read_text() == printed


@pytest.mark.parametrize(
  ("arguments", "environment", "said"),
  [
    (RECIPE, {}, "set IMAGE"),
    (RECIPE[:1], {"IMAGE": "i"}, "add --workdir=gs://"),
    (RECIPE, {"IMAGE": "i", "TOPOLOGY": "16"}, "TOPOLOGY=16"),
    (RECIPE, {"IMAGE": "i", "TOPOLOGY": "2x3"}, "6 chips do not come in machines"),
  ],
)
def test_mistakes(launches, arguments, environment, said):
  launches.stub("kubectl", "#!/bin/sh\necho $@ >>$JOURNAL\n")
  done = launches.run("gke_jobset.sh", *arguments, **environment)
  assert done.returncode == 2
  assert said in done.stderr
  assert done.stderr.startswith("error: ")
  assert launches.journal() == []


def test_the_template_names_each_placeholder_at_its_top():
  head, body = (ROOT / "launch" / "gke_jobset.yaml").read_text().split("apiVersion:", 1)
  assert set(re.findall(r"\$\{(\w+)\}", body)) == set(re.findall(r"\$\{(\w+)\}", head))
  yaml.safe_load(f"apiVersion:{body}")  # itself YAML, for editors


def test_the_image_holds_what_training_needs():
  text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
  steps = [line.split(maxsplit=1) for line in text.splitlines() if line[:1].isupper()]
  of = lambda kind: [rest for name, rest in steps if name == kind]  # noqa: E731
  assert of("FROM") == ["python:3.12-slim-bookworm"]
  assert json.loads(of("ENTRYPOINT")[0]) == ["python", "-m", "gcl_jax.train"]
  assert of("USER") not in ([], ["root"])
  assert [name for name, _ in steps].index("USER") > [name for name, _ in steps].index(
    "RUN"
  )
  sources = [copy.split()[0] for copy in of("COPY")]
  assert set(sources) == {"requirements.txt", "gcl_jax", "configs"}
  sent = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().split()
  assert sent[0] == "*"
  assert {f"!{source}" for source in sources} <= set(sent)
  assert all((ROOT / source).exists() for source in sources)
