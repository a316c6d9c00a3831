"""screen.jsonl -> records of the study `recipe`, one per variant and evaluation."""
import json, sys
from pathlib import Path
import torch
from ofa.comparison.environment import now, library_versions
from ofa.comparison.records import Cell, Record, Score
from ofa.comparison.plan import read_tasks
from ofa.comparison.grid import Grid
from ofa.comparison.store import opened
from ofa.metrics import metrics
D = "data/"
grid = Grid(tasks=[D+"sst2", D+"trec", D+"agnews", D+"emo", "reviews", "tickets", "questions"], methods=["norm-tuning"], seeds="42-44", shots=5, test_size=200)
tasks = read_tasks(grid)
BASE = {"base60": {"max_steps": 60}, "base30": {"max_steps": 30}, "base120": {"max_steps": 120}, "label60": {"max_steps": 60, "label_loss": 1.0},
        "stop": {"schedule": "constant"}, "decay60": {"max_steps": 60, "decay": 10}, "sam60": {"max_steps": 60, "sam": 0.02}, "lr2_60": {"max_steps": 60, "learning_rate": 0.002}, "null60": {"max_steps": 60, "null_calibration": "before"}}
rows = [json.loads(l) for l in open("screen.jsonl")]
with opened(Path(sys.argv[1])) as results:
    have = {r.cell.key for r in results.records}
    def put(r, settings, lp, seconds):
        plan = tasks[r["task"]]
        cell = Cell("HuggingFaceTB/SmolLM2-135M-Instruct", r["task"], plan.sha256, "norm-tuning", r["seed"], 5, 200, settings)
        if cell.key in have: return
        labels = plan.task.labels
        truth = [e.label for e in plan.tested]; assert [labels.index(t) for t in truth] == r["truth"]
        lp = lp.log_softmax(1)
        results.append(Record(cell, scores={"prompt": Score(metrics(lp.exp(), truth, labels).to_dict(), tuple(lp.argmax(1).tolist()), tuple(r["truth"]), 0.0, 0)},
            fit_seconds=seconds, seconds=seconds, trainable_parameters=35136, stored_bytes=140544, shots_sha256=plan.drawn[r["seed"]].sha256,
            finished=now(), versions={**library_versions(), "device": "cpu", "dtype": "bfloat16"}, notes={"untested": ["demonstrations"], "screened": True}))
        have.add(cell.key)
    for r in rows:
        base = BASE[r["variant"]]; sec = r["fit_cpu"]
        for e, v in r["evals"].items():
            s = dict(base)
            if e == "half": s["average"] = 0.5
            if e.startswith("half0"): s |= {"average": 0.5, "stop_loss": float(e[4:])}
            lp = torch.tensor(v["test"])
            put(r, s, lp, sec)
            if r["variant"] == "base60" and e == "last":
                for name in ("free", "domain"):
                    prior = torch.tensor(v[name]).exp().mean(0).log()
                    put(r, {**s, "calibration": {"free": "content-free", "domain": "random words"}[name]}, lp.log_softmax(1) - prior, sec)
print(len(have))
