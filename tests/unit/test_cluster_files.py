"""The cluster files, checked offline: by Ray, by botocore's and moto's EC2, and by lints of our own."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import moto
import pytest
import yaml
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.job_supervisor import JobSupervisor

from saltray import local_ray

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = ["config.yaml", "gcp.yaml"]
RAY_UP = [*CLOUDS, "on-prem.yaml"]
ALL = [*RAY_UP, "kuberay.yaml"]

Config = dict[str, Any]


def load(name: str) -> Config:
    return dict(next(iter(yaml.safe_load_all((CLUSTER / name).read_text()))))


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def texts(value: Any) -> Iterator[str]:
    """Every string in a nested value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (*texts(key), *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    else:
        yield str(value)


def problems(config: Config) -> list[str]:
    """What `validate_config` lets pass in a file for `ray up`."""
    found = []
    if not config.get("cluster_name"):
        found.append("no cluster_name: it would be called default")
    for name, kind in config.get("available_node_types", {}).items():
        if kind.get("min_workers", 0) > kind.get("max_workers", config.get("max_workers", 0)):
            found.append(f"{name}: min_workers over max_workers")
        if kind.get("max_workers", 0) > config["max_workers"]:
            found.append(f"{name}: max_workers over the cluster's")
    for text in texts(config):
        for package, version in re.findall(r"\b(?:pip|uv)\b.*?\s([A-Za-z][\w-]+)(==\S+)?$", text):
            if not version and "-e" not in text and "-r" not in text:
                found.append(f"{package}: installed without a version")
        image = re.fullmatch(r"\S+/ray:(\S+)", text)
        if image and not image[1].startswith(constraints()["ray"] + "-py311"):
            found.append(f"{text}: not the Ray of constraints.txt")
        if ":latest" in text or "nightly" in text:
            found.append(f"{text}: not pinned")
        if "0.0.0.0" in text or text == "::/0":
            found.append(f"{text}: open to everyone")
        if "ray start" in text and "RAY_AUTH_MODE=token" not in text:
            found.append("ray start without token authentication")
        if "ray start --head" in text and "--dashboard-host=127.0.0.1" not in text:
            found.append("the dashboard and the jobs API are not on loopback")
    if not any("auth_token" in mount for mount in config.get("file_mounts", {})):
        found.append("the token is not carried to the machines")
    return found


def aws_problems(config: Config) -> list[str]:
    """What EC2 itself would refuse, by the model of it that botocore carries."""
    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    found = []
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        report = botocore.validate.ParamValidator().validate(node | {"MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            found.append(f"{name}: {report.generate_report()}")
        if node.get("InstanceType") not in shape.members["InstanceType"].enum:
            found.append(f"{name}: no instance type {node.get('InstanceType')}")
        if not node.get("SecurityGroupIds"):
            found.append(f"{name}: no security group: Ray's own is open to everyone")
    return found


def prepared(config: Config) -> Config:
    config = copy.deepcopy(config)
    for kind in config.get("available_node_types", {}).values():
        kind.setdefault("resources", {})  # asked of the cloud by `ray up`
    return dict(prepare_config(config))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_and_the_lints_accept(name: str) -> None:
    validate_config(prepared(load(name)))
    assert problems(load(name)) == []


@pytest.mark.parametrize("name", ALL)
def test_versions_are_those_of_the_constraints(name: str) -> None:
    known = constraints()
    pinned = re.findall(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", (CLUSTER / name).read_text())
    assert [(package, version) for package, version in pinned if known.get(package, version) != version] == []


def test_ec2_knows_every_setting_and_machine() -> None:
    assert aws_problems(load("config.yaml")) == []


@pytest.mark.parametrize("name", ALL)
def test_headers_say_what_it_costs_what_to_edit_and_the_commands(name: str) -> None:
    head = (CLUSTER / name).read_text().split("\n\ncluster_name:")[0].split("\n\napiVersion:")[0]
    for title in ("# What it costs", "# What to edit", "# Commands"):
        assert title in head
    quoted = f"'ray[default]=={constraints()['ray']}'"  # zsh takes the brackets for a pattern
    assert "ray[default]" not in head.replace(quoted, "")


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_does_no_trials_and_spot_workers_come_and_go(name: str) -> None:
    config = load(name)
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert kinds["gpu"]["min_workers"] == 0 and kinds["gpu"]["resources"]["GPU"] == 1
    assert "spot" in json.dumps(kinds["gpu"]["node_config"]).lower()
    assert "spot" not in json.dumps(kinds[config["head_node_type"]]["node_config"]).lower()
    assert 0 < config["idle_timeout_minutes"] <= 10
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--object-spilling-directory=/local" in config[commands][1]


def broken(name: str, **changes: Any) -> Config:
    """A copy of a file with some fields changed; `a__b` reaches inside, None removes."""
    config = load(name)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner: Any = config
        for key in parents:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return config


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync")
@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_carries_the_code_and_neither_tiles_nor_keys(name: str, tmp_path: Path) -> None:
    code = ["saltray/tune.py", "saltray/data/dataset.py", "saltray/reporting/page.html.jinja"]
    code += ["search_spaces/unet.py", "constraints.txt", "pyproject.toml", "README.md"]
    private = ["data/train.csv", "tgs/train/images/1.png", "train.zip", "a/test.zip", "kaggle.json", ".env"]
    for file in [*code, *private, "runs/mine/study.db", ".venv/bin/python", ".git/config"]:
        (tmp_path / "from" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / file).touch()
    shutil.copy(ROOT / ".gitignore", tmp_path / "from")
    config = load(name)
    runner: Any = SSHCommandRunner
    options = runner._create_rsync_filter_args(None, config)
    command = ["rsync", "-a", *options, f"{tmp_path}/from/", f"{tmp_path}/to/"]
    subprocess.run(command, check=True, timeout=60)
    carried = {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()}
    assert carried == {*code, ".gitignore"}


START = ["ray stop", "ray start --head --dashboard-host=0.0.0.0"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (broken("config.yaml", cluster_name=None), "no cluster_name"),
        (broken("config.yaml", available_node_types__gpu__min_workers=9), "min_workers over max_workers"),
        (broken("config.yaml", available_node_types__gpu__max_workers=99), "over the cluster's"),
        (broken("gcp.yaml", head_setup_commands=["pip install -q boto3"]), "boto3: installed without"),
        (broken("gcp.yaml", docker__image="rayproject/ray:2.59.0-py311"), "not the Ray of constraints"),
        (broken("gcp.yaml", docker__image="rayproject/ray:latest"), "not pinned"),
        (broken("on-prem.yaml", head_start_ray_commands=START), "open to everyone"),
        (broken("on-prem.yaml", head_start_ray_commands=START), "without token authentication"),
        (broken("on-prem.yaml", head_start_ray_commands=START), "not on loopback"),
        (broken("on-prem.yaml", file_mounts={}), "token is not carried"),
    ],
)
def test_the_lints_find(config: Config, message: str) -> None:
    assert any(message in problem for problem in problems(config))


def test_open_ports_and_misspelt_machines_are_found() -> None:
    config = load("config.yaml")
    node = config["available_node_types"]["gpu"]["node_config"]
    del node["SecurityGroupIds"]
    assert any("open to everyone" in problem for problem in aws_problems(config))
    node["InstanceTyp"] = node.pop("InstanceType")
    assert any('Unknown parameter in input: "InstanceTyp"' in problem for problem in aws_problems(config))
    del node["InstanceTyp"]
    node["InstanceType"] = "g6.xlrage"
    assert any("no instance type g6.xlrage" in problem for problem in aws_problems(config))


@pytest.fixture
def ec2() -> Iterator[Any]:
    """A simulated EC2, with the VPC and the subnets that an account begins with."""
    with moto.mock_aws():
        region = load("config.yaml")["provider"]["region"]
        yield botocore.session.get_session().create_client("ec2", region)
    for cache in (client_cache, resource_cache, aws._get_subnets_or_die):
        cache.cache_clear()  # Ray's, of this simulation


def make_group(ec2: Any) -> str:
    """Make the security group by the commands in the file's header; return its id."""
    lines = re.findall(r"aws ec2 (\S+) (--[^)\n]*)", (CLUSTER / "config.yaml").read_text())
    made, *rules = [(name, dict(zip(*[iter(shlex.split(rest))] * 2, strict=True))) for name, rest in lines]
    assert made[0] == "create-security-group"
    group = ec2.create_security_group(GroupName=made[1]["--group-name"], Description=made[1]["--description"])
    values = {"$group": group["GroupId"], "YOUR.ADDRESS/32": "192.0.2.1/32"}
    for name, given in rules:
        rule = {option.removeprefix("--"): str(values.get(value, value)) for option, value in given.items()}
        assert name == "authorize-security-group-ingress" and rule.pop("group-id") == group["GroupId"]
        permission: Config = {"IpProtocol": "-1" if rule["protocol"] == "all" else rule["protocol"]}
        if "port" in rule:
            permission |= {"FromPort": int(rule["port"]), "ToPort": int(rule["port"])}
        if "cidr" in rule:
            permission["IpRanges"] = [{"CidrIp": rule["cidr"]}]
        if "source-group" in rule:
            permission["UserIdGroupPairs"] = [{"GroupId": rule["source-group"]}]
        ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[permission])
    return str(group["GroupId"])


def configured(group: str | None) -> Config:
    """The file with this security group (None: with none), as `ray up` completes it in the account."""
    config = load("config.yaml")
    for kind in config["available_node_types"].values():
        kind["node_config"].pop("SecurityGroupIds")
        if group is not None:
            kind["node_config"]["SecurityGroupIds"] = [group]
    ray: Any = aws
    return dict(ray._configure_security_group(ray._configure_subnet(config)))


def opened(ec2: Any, group: str) -> list[tuple[Any, ...]]:
    """Who may reach which ports of a security group's machines."""
    rules = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    return [
        (rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort"), who)
        for rule in rules
        for who in [r["CidrIp"] for r in rule["IpRanges"]] + [g["GroupId"] for g in rule["UserIdGroupPairs"]]
    ]


def test_with_the_headers_security_group_only_one_address_reaches_port_22(ec2: Any) -> None:
    group = make_group(ec2)
    for kind in configured(group)["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] == [group]
    assert sorted(opened(ec2, group)) == sorted(
        [("-1", None, None, group), ("tcp", 22, 22, "192.0.2.1/32")], key=str
    )


def test_without_it_ray_would_open_port_22_to_everyone_and_one_that_is_not_there_is_refused(
    ec2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    head = configured(None)["available_node_types"]["head"]["node_config"]
    assert ("tcp", 22, 22, "0.0.0.0/0") in opened(ec2, head["SecurityGroupIds"][0])
    with pytest.raises(AssertionError):
        configured("sg-00000000000000000")
    assert "Failed to detect a security group" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["aws-head-policy.json", "aws-worker-policy.json"])
def test_a_role_reaches_one_prefix_of_one_bucket(name: str) -> None:
    for statement in json.loads((CLUSTER / name).read_text())["Statement"]:
        actions = statement["Action"]
        assert statement["Effect"] == "Allow" and not any("*" in action for action in actions)
        if any(action.startswith("s3:") for action in actions):
            listing = actions == ["s3:ListBucket"] and "s3:prefix" in json.dumps(statement["Condition"])
            assert listing or statement["Resource"] == "arn:aws:s3:::BUCKET/saltray/*"
        elif statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions)


def test_the_head_on_google_cloud_may_give_the_workers_their_account() -> None:
    header = (CLUSTER / "gcp.yaml").read_text().partition("\ncluster_name:")[0]
    command = re.findall(
        r"add-iam-policy-binding (\S+) .*?serviceAccount:(\S+) --role (\S+)", header, re.DOTALL
    )
    kinds = load("gcp.yaml")["available_node_types"]
    accounts = {name: kind["node_config"]["serviceAccounts"][0]["email"] for name, kind in kinds.items()}
    assert accounts["gpu"] == accounts["data"]
    assert command == [(accounts["gpu"], accounts["head"], "roles/iam.serviceAccountUser")]


def strict(required: list[str], **properties: Any) -> dict[str, Any]:
    """A schema of an object with these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


STRING, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
PARAMETERS = {"type": "object", "additionalProperties": STRING}  # a number would be refused
CONTAINER = strict(
    ["name", "image", "resources"],
    name=STRING,
    image=STRING,
    env=array(strict(["name", "value"], name=STRING, value=STRING)),
    ports=array(strict(["containerPort"], containerPort=COUNT, name=STRING)),
    resources=strict(["limits", "requests"], limits=PARAMETERS, requests=PARAMETERS),
    volumeMounts=array(strict(["name", "mountPath"], name=STRING, mountPath=STRING)),
)
POD = strict(
    ["metadata", "spec"],
    metadata=strict(["labels"], labels=PARAMETERS),
    spec=strict(
        ["containers"],
        serviceAccountName=STRING,
        nodeSelector=PARAMETERS,
        tolerations=array(strict(["key"], key=STRING, operator=STRING, effect=STRING)),
        containers=array(CONTAINER),
        volumes=array(strict(["name", "emptyDir"], name=STRING, emptyDir=strict([], sizeLimit=STRING))),
    ),
)
RAY_JOB = strict(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=strict(["name"], name=STRING),
    spec=strict(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=STRING,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=strict(
            ["headGroupSpec", "rayVersion", "authOptions"],
            rayVersion=STRING,
            authOptions=strict(["mode"], mode={"const": "token"}),
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=strict([], idleTimeoutSeconds=COUNT),
            headGroupSpec=strict(
                ["template", "rayStartParams"],
                serviceType={"const": "ClusterIP"},
                rayStartParams=PARAMETERS,
                template=POD,
            ),
            workerGroupSpecs=array(
                strict(
                    ["groupName", "template", "minReplicas", "maxReplicas", "rayStartParams"],
                    groupName=STRING,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=PARAMETERS,
                    template=POD,
                )
            ),
        ),
    ),
)
"""What kuberay.yaml uses of KubeRay's and Kubernetes' resources, from their references: KubeRay's own schema
comes with no Python package."""


def test_kuberay_has_only_fields_that_the_references_know() -> None:
    job = load("kuberay.yaml")
    jsonschema.validate(job, RAY_JOB)
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.validate(job | {"spec": job["spec"] | {"entryPoint": "x"}}, RAY_JOB)


def test_kuberay_agrees_with_itself_and_with_the_constraints() -> None:
    cluster = load("kuberay.yaml")["spec"]["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    assert cluster["rayVersion"] == constraints()["ray"]
    assert f"FROM rayproject/ray:{constraints()['ray']}-py311" in (CLUSTER / "Dockerfile").read_text()
    pods = [cluster["headGroupSpec"], *groups]
    images = {c["image"] for pod in pods for c in pod["template"]["spec"]["containers"]}
    assert len(images) == 1 and images.pop().rpartition(":")[2] not in ("", "latest")
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_kuberay_lets_only_its_own_pods_and_the_operator_in() -> None:
    policy = list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))[1]
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    for rule in policy["spec"]["ingress"]:
        assert rule["from"] and all(peer for peer in rule["from"])  # an empty one would mean everybody
    job = next(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))
    cluster = job["spec"]["rayClusterSpec"]
    selected = dict(policy["spec"]["podSelector"]["matchLabels"])
    assert selected.pop("ray.io/node-type") == "head"  # KubeRay's own label
    assert selected == policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert selected.items() <= group["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ALL)
def test_only_places_to_edit_and_no_secret_stand_in_a_file(name: str) -> None:
    text = (CLUSTER / name).read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|password|secret_?key", text, re.IGNORECASE)
    for address in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text):
        assert address.startswith("192.0.2.") or address in ("127.0.0.1", "0.0.0.0")  # RFC 5737


@pytest.mark.parametrize("group", ["gpu", "data"])
def test_pods_that_work_have_rays_settings_too(group: str) -> None:
    job, *_ = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    groups = {g["groupName"]: g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    (container,) = groups[group]["template"]["spec"]["containers"]
    assert {entry["name"]: entry["value"] for entry in container["env"]} == local_ray.SETTINGS


@pytest.mark.parametrize("name", RAY_UP)
def test_rays_settings_are_the_same_on_all_machines(name: str) -> None:
    config = yaml.safe_load((CLUSTER / name).read_text())
    for kind in ("head", "worker"):
        start = " ".join(config[f"{kind}_start_ray_commands"])
        assert "RAY_grpc_client_keepalive_time_ms=11000" in start
        assert "RAY_grpc_client_keepalive_timeout_ms=10000" in start
        for variable, value in local_ray.SETTINGS.items():
            assert f"{variable}={value}" in start


@pytest.mark.parametrize("name", ALL)
def test_ray_job_stop_ends_a_search_like_ctrl_c(name: str) -> None:
    config = load(name)
    if name == "kuberay.yaml":
        (head,) = config["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        start = " ".join(f"{entry['name']}={entry['value']}" for entry in head["env"])
    else:
        start = " ".join(config["head_start_ray_commands"])
    assert "RAY_JOB_STOP_SIGNAL=SIGINT" in start and "SIGINT" in JobSupervisor.VALID_STOP_SIGNALS
    assert int(re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", start)[0]) >= 600
