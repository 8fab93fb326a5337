"""A cluster small enough for a test: an API server on loopback that keeps Jobs, JobSets and pods, and does with them
what the control plane and a kubelet do. Containers are real processes of this machine, without their image and mounts:
paths are those of this machine.

What is real: HTTP, labels and their selectors, pages, 409, 422 by the schema, foreground deletion, grace, exit codes,
waiting and terminated reasons, ``$(NAME)`` in commands, ``DisruptionTarget``, ``podFailurePolicy``, Kueue's suspension.
Words and messages are those of Kubernetes 1.37.
"""

import copy
import http.server
import json
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import yaml

PATHS = {
    "jobs": re.compile(r"/apis/batch/v1/namespaces/([^/]+)/jobs(?:/([^/]+))?"),
    "jobsets": re.compile(
        r"/apis/jobset\.x-k8s\.io/v1alpha2/namespaces/([^/]+)/jobsets(?:/([^/]+))?"
    ),
    "pods": re.compile(r"/api/v1/namespaces/([^/]+)/pods(?:/([^/]+)(/log)?)?"),
}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound",
           409: "AlreadyExists", 422: "Invalid", 503: "ServiceUnavailable"}  # fmt: skip
TICK_S = 0.02
NODE = "node-1"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


def expanded(text: str, variables: dict[str, str]) -> str:
    """What a kubelet makes of ``$(NAME)``: ``$$`` is one ``$``, an unknown name stays as it is written."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]),
        text,
    )


def matches(selector: str, labels: dict[str, str]) -> bool:
    for part in re.findall(r"[^,( ]+ in \([^)]*\)|[^,]+", selector):
        key, _, values = part.partition(" in ")
        if values:
            if labels.get(key.strip()) not in values.strip("()").split(","):
                return False
        elif "=" in part:
            key, _, value = part.partition("=")
            if labels.get(key) != value:
                return False
        elif part not in labels:
            return False
    return True


class Cluster:
    """Use it as a context: the server and everything it started end with it.

    Attributes:
        gpus: GPUs of the one node.
        images: Images that it can fetch; ``None`` for all.
        secrets: name -> key -> value.
        validates: Whether manifests are checked against the schema, which takes a moment each.
        admitted: Whether Kueue lets go what has a queue's label.
        broken: Status of every answer instead of the right one.
        requests: (method, path) of all requests.
    """

    def __init__(self, folder: Path, *, gpus: int = 4) -> None:
        self.folder, self.gpus = folder, gpus
        self.images: set[str] | None = None
        self.secrets: dict[str, dict[str, str]] = {}
        self.admitted, self.jobset_installed, self.validates = True, True, True
        self.broken: int | None = None
        self.token: str | None = None
        self.requests: list[tuple[str, str]] = []
        self.before_answer = lambda _method, _path: None
        self.lock = threading.RLock()
        self.objects: dict[str, dict[str, dict]] = {"jobs": {}, "jobsets": {}, "pods": {}}
        self.processes: dict[str, subprocess.Popen] = {}
        self.kill_at: dict[str, float] = {}
        self.oom: set[str] = set()
        self.ended = threading.Event()

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        handler = type("Handler", (Handler,), {"cluster": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.controller = threading.Thread(target=self._control, daemon=True)
        self.controller.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.controller.join(10)
        self.server.shutdown()
        self.server.server_close()
        for uid in list(self.processes):
            self._kill_container(uid)

    def kubeconfig(self, namespace: str = "ml") -> Path:
        user = {"token": self.token} if self.token else {}
        file = self.folder / "kubeconfig"
        file.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "here",
                    "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                    "users": [{"name": "me", "user": user}],
                    "contexts": [
                        {
                            "name": "here",
                            "context": {"cluster": "fake", "user": "me", "namespace": namespace},
                        }
                    ],
                }
            )
        )
        return file

    # What tests do to it.

    def pods(self, job: str | None = None) -> list[dict]:
        with self.lock:
            found = self.objects["pods"].values()
            return [
                copy.deepcopy(one)
                for one in found
                if job in (None, one["metadata"]["labels"].get("toolkit/object"))
            ]

    def disrupt(self, pod: str, reason: str = "PreemptionByScheduler") -> None:
        """Take a pod away in order: the condition, then SIGTERM and its grace; then the pod is deleted."""
        with self.lock:
            found = self.objects["pods"][pod]
            self._condition(found, "DisruptionTarget", "True", reason, f"{reason}: taken away")
            self._delete_pod(found, None)

    def evict(self, pod: str, reason: str = "Evicted") -> None:
        """Take a pod away as its kubelet does when the node is short of something: it stays, in phase Failed."""
        with self.lock:
            found = self.objects["pods"][pod]
            found["status"]["reason"] = reason
            found["status"]["message"] = "The node was low on resource: memory."
            self._stop_container(found, 0)

    def refuse(self, pod: str, reason: str = "UnexpectedAdmissionError") -> None:
        """A node does not take the pod that it was given."""
        with self.lock:
            found = self.objects["pods"][pod]
            found["status"] = {"phase": "Failed", "reason": reason, "message": "device is gone"}

    def run_out_of_memory(self, pod: str) -> None:
        """The kernel kills every process of the container."""
        with self.lock:
            found = self.objects["pods"][pod]
            self.oom.add(found["metadata"]["uid"])
            self._kill_container(found["metadata"]["uid"])

    def lose_node(self, *, forget: bool) -> None:
        """The node goes without a word; with ``forget`` the control plane has seen it and deleted its pods."""
        with self.lock:
            for pod in list(self.objects["pods"].values()):
                uid = pod["metadata"]["uid"]
                process = self.processes.pop(uid, None)
                _kill_all(uid)
                if process:
                    process.wait(10)
                    pod["lost"] = True
                if forget and process:
                    reason = "DeletionByTaintManager"
                    self._condition(pod, "DisruptionTarget", "True", reason, "Taint manager")
                    self._fail_job_of(pod)
                    self.objects["pods"].pop(pod["metadata"]["name"])

    # The API server.

    def create(self, kind: str, namespace: str, given: dict) -> dict:
        name = given["metadata"].get("name", "")
        if kind == "jobsets" and not self.jobset_installed:
            raise Refusal(404, "the server could not find the requested resource")
        if self.validates:
            self._validate(kind, given)
        wrong = [v for v in given["metadata"].get("labels", {}).values() if not LABEL.fullmatch(v)]
        if not NAME.fullmatch(name) or wrong:
            raise Refusal(422, f'Job.batch "{name}" is invalid: metadata: {wrong or name}')
        if given["metadata"].get("namespace", namespace) != namespace:
            raise Refusal(400, "the namespace of the provided object does not match the request")
        with self.lock:
            if name in self.objects[kind]:
                raise Refusal(409, f'{kind}.batch "{name}" already exists')
            given["metadata"] |= {
                "uid": str(uuid.uuid4()),
                "namespace": namespace,
                "creationTimestamp": now(),
            }
            if given["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name"):
                given["spec"]["suspend"] = True
            given["status"] = {}
            self.objects[kind][name] = given
            return copy.deepcopy(given)

    @staticmethod
    def _validate(kind: str, given: dict) -> None:
        import kubernetes_validate

        groups = given["spec"].get("replicatedJobs", [])
        specs = [given["spec"]] if kind == "jobs" else [one["template"]["spec"] for one in groups]
        for spec in specs:
            job = {"apiVersion": "batch/v1", "kind": "Job", "spec": spec}
            try:
                kubernetes_validate.validate(job, "1.37", strict=True)
            except kubernetes_validate.ValidationError as error:
                raise Refusal(400, f"strict decoding error: {error.message}") from error

    def listed(self, kind: str, query: dict[str, str]) -> dict:
        with self.lock:
            found = [
                copy.deepcopy(one)
                for one in self.objects[kind].values()
                if matches(query.get("labelSelector", ""), one["metadata"].get("labels", {}))
            ]
        start, limit = int(query.get("continue", 0)), int(query.get("limit", 10**9))
        more = {"continue": str(start + limit)} if len(found) > start + limit else {}
        return {"kind": "List", "metadata": more, "items": found[start : start + limit]}

    def delete(self, kind: str, name: str, query: dict[str, str], body: dict) -> dict:
        with self.lock:
            found = self.found(kind, name)
            if kind == "pods":
                grace = query.get("gracePeriodSeconds")
                self._delete_pod(found, None if grace is None else int(grace))
                return copy.deepcopy(found)
            assert body.get("propagationPolicy") == "Foreground"
            found["metadata"].setdefault("deletionTimestamp", now())
            return copy.deepcopy(found)

    def found(self, kind: str, name: str) -> dict:
        with self.lock:
            if name not in self.objects[kind]:
                raise Refusal(404, f'{kind} "{name}" not found')
            return self.objects[kind][name]

    # The controllers and the kubelet.

    def _control(self) -> None:
        while not self.ended.wait(TICK_S):
            with self.lock:
                for jobset in list(self.objects["jobsets"].values()):
                    self._jobset(jobset)
                for job in list(self.objects["jobs"].values()):
                    self._job(job)
                for pod in list(self.objects["pods"].values()):
                    self._pod(pod)

    def _jobset(self, jobset: dict) -> None:
        name = jobset["metadata"]["name"]
        child = f"{name}-n-0"
        if jobset["metadata"].get("deletionTimestamp"):
            if child in self.objects["jobs"]:
                self.objects["jobs"][child]["metadata"].setdefault("deletionTimestamp", now())
            else:
                self.objects["jobsets"].pop(name)
            return None
        if jobset["spec"].get("suspend") and self.admitted:
            jobset["spec"]["suspend"] = False
        if jobset["spec"].get("suspend"):
            return self._condition(
                jobset, "Suspended", "True", "SuspendedJobs", "jobset is suspended"
            )
        template = copy.deepcopy(jobset["spec"]["replicatedJobs"][0]["template"])
        if child not in self.objects["jobs"] and not self._over(jobset):
            labels = template["metadata"]["labels"]
            labels["jobset.sigs.k8s.io/jobset-name"] = name
            template["spec"]["template"]["metadata"]["labels"] = dict(labels)
            meta = {"name": child, "labels": labels, "uid": str(uuid.uuid4()), "owner": name,
                    "namespace": jobset["metadata"]["namespace"]}  # fmt: skip
            self.objects["jobs"][child] = {"metadata": meta, "spec": template["spec"], "status": {}}
        done = self.objects["jobs"].get(child, {"status": {}})
        if self._holds(done, "Complete"):
            self._condition(jobset, "Completed", "True", "AllJobsCompleted", "jobset completed")
        elif self._holds(done, "Failed"):
            why = f"jobset failed due to one or more job failures (first failed job: {child})"
            self._condition(jobset, "Failed", "True", "FailedJobs", why)
        return None

    def _job(self, job: dict) -> None:  # noqa: C901
        name, spec = job["metadata"]["name"], job["spec"]
        pods = [p for p in self.objects["pods"].values() if p["metadata"]["owner"] == name]
        if job["metadata"].get("deletionTimestamp"):
            for pod in pods:
                self._delete_pod(pod, None)
            if not pods:
                self.objects["jobs"].pop(name)
            return
        if self._over(job):
            return
        if spec.get("suspend") and self.admitted:
            spec["suspend"] = False
            self._condition(job, "Suspended", "False", "JobResumed", "Job resumed")
        if spec.get("suspend") or (not self.admitted and self._queued(job)):
            spec["suspend"] = True
            self._condition(job, "Suspended", "True", "JobSuspended", "Job suspended")
            for pod in pods:
                self._delete_pod(pod, None)
            return
        failed = [p for p in pods if p["status"]["phase"] == "Failed"]
        if failed:
            self._fail_job_of(failed[0])
            for pod in pods:
                if pod["status"]["phase"] not in ("Failed", "Succeeded"):
                    self._delete_pod(pod, None)
            return
        count = spec.get("completions", 1)
        if len([p for p in pods if p["status"]["phase"] == "Succeeded"]) == count:
            self._condition(
                job, "Complete", "True", "CompletionsReached", "Reached expected number"
            )
        live = [p for p in pods if not p["metadata"].get("deletionTimestamp")]
        taken = {p["metadata"]["index"] for p in pods}
        if len(live) == len(
            pods
        ):  # podReplacementPolicy: Failed - nothing new before the old one is gone
            for index in sorted(set(range(count)) - taken):
                self._make_pod(job, index)

    def _queued(self, job: dict) -> bool:
        return "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})

    def _fail_job_of(self, pod: dict) -> None:
        job = self.objects["jobs"].get(pod["metadata"]["owner"])
        if job is None or self._over(job) or job["metadata"].get("deletionTimestamp"):
            return None
        where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        code = _exit_code(pod)
        for index, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
            if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
                ended = f"Container step for pod {where} failed with exit code {code}"
                text = f"{ended} matching FailJob rule at index {index}"
                return self._condition(job, "Failed", "True", "PodFailurePolicy", text)
            if "onPodConditions" in rule and self._holds(pod, "DisruptionTarget"):
                text = f"Pod {where} has condition DisruptionTarget matching FailJob rule at index {index}"
                return self._condition(job, "Failed", "True", "PodFailurePolicy", text)
        text = "Job has reached the specified backoff limit"
        return self._condition(job, "Failed", "True", "BackoffLimitExceeded", text)

    def _make_pod(self, job: dict, index: int) -> None:
        template = copy.deepcopy(job["spec"]["template"])
        name = f"{job['metadata']['name'][:57]}-{uuid.uuid4().hex[:5]}"
        uid = job["metadata"]["uid"]
        labels = {
            **template["metadata"]["labels"],
            "batch.kubernetes.io/job-name": job["metadata"]["name"],
            "batch.kubernetes.io/controller-uid": uid,
        }
        notes = {
            **template["metadata"].get("annotations", {}),
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        metadata = {"name": name, "namespace": job["metadata"]["namespace"], "labels": labels,
                    "annotations": notes, "uid": str(uuid.uuid4()), "creationTimestamp": now(),
                    "owner": job["metadata"]["name"], "index": index}  # fmt: skip
        self.objects["pods"][name] = {
            "metadata": metadata,
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }

    def _pod(self, pod: dict) -> None:
        uid, status = pod["metadata"]["uid"], pod["status"]
        if status["phase"] == "Pending":
            if pod["metadata"].get("deletionTimestamp"):
                self.objects["pods"].pop(pod["metadata"]["name"])
            elif "nodeName" not in pod["spec"]:
                self._schedule(pod)
            else:
                self._start(pod)
        elif uid in self.processes:
            code = self.processes[uid].poll()
            if code is None and time.monotonic() >= self.kill_at.get(uid, float("inf")):
                self._kill_container(uid)
            elif code is not None:
                self._container_ended(pod, code)
        elif status["phase"] in ("Succeeded", "Failed") and pod["metadata"].get(
            "deletionTimestamp"
        ):
            self._fail_job_of(pod) if status["phase"] == "Failed" else None
            self.objects["pods"].pop(pod["metadata"]["name"])

    def _schedule(self, pod: dict) -> None:
        wanted = _gpus(pod)
        used = sum(
            _gpus(one)
            for one in self.objects["pods"].values()
            if "nodeName" in one["spec"] and one["status"]["phase"] in ("Pending", "Running")
        )
        if used + wanted > self.gpus:
            text = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
            self._condition(pod, "PodScheduled", "False", "Unschedulable", text)
            return
        self._condition(pod, "PodScheduled", "True", None, None)
        pod["spec"]["nodeName"] = NODE
        pod["status"]["startTime"] = now()
        self._waits(pod, "ContainerCreating", None)

    def _start(self, pod: dict) -> None:
        container = pod["spec"]["containers"][0]
        image = container["image"]
        if self.images is not None and image not in self.images:
            return self._waits(
                pod, "ImagePullBackOff", f'Back-off pulling image "{image}": not found'
            )
        try:
            variables = self._variables(pod, container)
        except KeyError as error:
            text = f"secret {error.args[0]!r} not found".replace("'", '"')
            return self._waits(pod, "CreateContainerConfigError", text)
        command = [expanded(word, variables) for word in container["command"]]
        uid = pod["metadata"]["uid"]
        own = {"PATH": os.environ["PATH"], "HOSTNAME": pod["metadata"]["name"], "FAKE_POD": uid}
        log = (self.folder / f"{uid}.log").open("wb")
        try:
            process = subprocess.Popen(
                command, env=own | variables, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            end = {"exitCode": 128, "reason": "StartError", "message": f"exec: {error}"}
            pod["status"]["containerStatuses"] = [{"name": "step", "state": {"terminated": end}}]
            pod["status"]["phase"] = "Failed"
            return None
        finally:
            log.close()
        self.processes[uid] = process
        pod["status"]["phase"] = "Running"
        pod["status"]["containerStatuses"] = [
            {"name": "step", "state": {"running": {"startedAt": now()}}}
        ]
        return None

    def _variables(self, pod: dict, container: dict) -> dict[str, str]:
        found: dict[str, str] = {}
        for one in container["env"]:
            source = one.get("valueFrom", {})
            if "secretKeyRef" in source:
                reference = source["secretKeyRef"]
                found[one["name"]] = self.secrets[reference["name"]][reference["key"]]
            elif "fieldRef" in source:
                path = re.fullmatch(r"metadata\.(\w+)\['(.+)'\]", source["fieldRef"]["fieldPath"])
                found[one["name"]] = pod["metadata"][path[1]].get(path[2], "")
            else:
                found[one["name"]] = expanded(one["value"], found)
        return found

    def _waits(self, pod: dict, reason: str, message: str | None) -> None:
        waiting = {"reason": reason} | ({"message": message} if message else {})
        pod["status"]["containerStatuses"] = [{"name": "step", "state": {"waiting": waiting}}]

    def _container_ended(self, pod: dict, code: int) -> None:
        uid = pod["metadata"]["uid"]
        self.processes.pop(uid)
        _kill_all(uid)  # the first process of a container takes the others with it
        code = 128 - code if code < 0 else code
        reason = "OOMKilled" if uid in self.oom else "Completed" if code == 0 else "Error"
        tail = (self.folder / f"{uid}.log").read_bytes()[-2048:].decode(errors="replace")
        end = {"exitCode": code, "reason": reason} | ({"message": tail} if code else {})
        pod["status"]["containerStatuses"] = [{"name": "step", "state": {"terminated": end}}]
        evicted = pod["status"].get("reason")
        pod["status"]["phase"] = "Succeeded" if code == 0 and not evicted else "Failed"

    def _delete_pod(self, pod: dict, grace: int | None) -> None:
        given = pod["spec"]["terminationGracePeriodSeconds"] if grace is None else grace
        pod["metadata"].setdefault("deletionTimestamp", now())
        if not pod.get("lost"):  # a node that is gone confirms nothing
            self._stop_container(pod, given)

    def _stop_container(self, pod: dict, grace: float) -> None:
        uid = pod["metadata"]["uid"]
        process = self.processes.get(uid)
        if process is None:
            return
        end = time.monotonic() + grace
        if uid not in self.kill_at:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        self.kill_at[uid] = min(end, self.kill_at.get(uid, end))  # grace can only get shorter

    def _kill_container(self, uid: str) -> None:
        process = self.processes.get(uid)
        if process and process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(10)
        _kill_all(uid)

    @staticmethod
    def _holds(given: dict, kind: str) -> bool:
        found = given["status"].get("conditions", [])
        return any(one["type"] == kind and one["status"] == "True" for one in found)

    def _over(self, job: dict) -> bool:
        return any(self._holds(job, kind) for kind in ("Complete", "Completed", "Failed"))

    @staticmethod
    def _condition(
        given: dict, kind: str, status: str, reason: str | None, text: str | None
    ) -> None:
        kept = [one for one in given["status"].get("conditions", []) if one["type"] != kind]
        one = {"type": kind, "status": status, "reason": reason, "message": text}
        given["status"]["conditions"] = [*kept, {k: v for k, v in one.items() if v is not None}]


def _gpus(pod: dict) -> int:
    limits = pod["spec"]["containers"][0]["resources"].get("limits", {})
    return int(limits.get("nvidia.com/gpu", 0))


def _exit_code(pod: dict) -> int | None:
    for one in pod["status"].get("containerStatuses", ()):
        if "terminated" in one["state"]:
            return one["state"]["terminated"]["exitCode"]
    return None


def _kill_all(uid: str) -> None:
    """Every process of a container, whatever session or parent it has by now."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FAKE_POD") == uid:
                process.kill()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handled("GET")

    def do_POST(self):
        self.handled("POST")

    def do_DELETE(self):
        self.handled("DELETE")

    def handled(self, method: str) -> None:
        try:
            self.route(method)
        except Refusal as no:
            self.answer(
                {"kind": "Status", "status": "Failure", "code": no.status, "message": no.message,
                 "reason": REASONS[no.status]},
                no.status,
            )  # fmt: skip

    def route(self, method: str) -> None:
        cluster, url = self.cluster, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        cluster.requests.append((method, url.path))
        if cluster.broken:
            raise Refusal(cluster.broken, "the server is currently unable to handle the request")
        if cluster.token and self.headers.get("Authorization") != f"Bearer {cluster.token}":
            raise Refusal(401, "Unauthorized")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        for kind, pattern in PATHS.items():
            if found := pattern.fullmatch(url.path):
                return self.serve(method, kind, found, query, body)
        raise Refusal(404, "the server could not find the requested resource")

    def serve(self, method: str, kind: str, found: re.Match, query: dict, body: bytes) -> None:
        cluster, name = self.cluster, found[2]
        if method == "POST":
            if self.headers["Content-Type"] != "application/yaml":
                raise Refusal(400, "this server reads application/yaml only")
            made = cluster.create(kind, found[1], yaml.safe_load(body))
            cluster.before_answer(method, self.path)
            return self.answer(made, 201)
        if method == "DELETE":
            return self.answer(cluster.delete(kind, name, query, json.loads(body or b"{}")))
        if kind == "pods" and found[3]:
            return self.log(name, follow=query.get("follow") == "true")
        if name:
            return self.answer(cluster.found(kind, name))
        return self.answer(cluster.listed(kind, query))

    def log(self, name: str, *, follow: bool) -> None:
        pod = self.cluster.found("pods", name)
        if pod["status"]["phase"] == "Pending":
            raise Refusal(400, f'container "step" in pod "{name}" is waiting to start')
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        uid = pod["metadata"]["uid"]
        with (self.cluster.folder / f"{uid}.log").open("rb") as file:
            while True:
                live = uid in self.cluster.processes
                if chunk := file.read(65536):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                elif not (follow and live) or self.cluster.ended.is_set():
                    break
                else:
                    time.sleep(TICK_S)
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(body)
