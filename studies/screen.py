"""Screening queue: one training run per (variant, task, seed); several evaluations of it; log-probabilities kept."""
import dataclasses, json, os, random, sys, time, traceback, math
from pathlib import Path
import torch
from torch.nn import functional as F
torch.set_num_threads(1)
import ofa.trainer as trainer
from ofa.encoding import Encoder, model_window, collate, scores_whole_words
from ofa.evaluation import Scorer
from ofa.models import load_model
from ofa.tasks import load_task, few_shot, class_balanced
from ofa.trainer import TrainingConfig, train
from ofa.tuning import tune_norms, restore_norms
import ofa.loss as L

HERE = Path(sys.argv[1])  # with queue.txt: lines of variant, seeds, tasks; OUT = HERE / "screen.jsonl"
D = "data/"
TASKS = {"sst2": D+"sst2", "trec": D+"trec", "agnews": D+"agnews", "emo": D+"emo", "reviews": "reviews", "tickets": "tickets", "questions": "questions"}
plain_ce = L.cross_entropy

def read_logits(model, examples):
    device = next(model.parameters()).device
    ids, mask = collate([e.read for e in examples], 0)
    rows, positions, targets, weights = L._targets(examples, device)
    kept, places = positions.unique(return_inverse=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
    return logits[rows, places].float(), targets

def combined(firsts, weight_label=0.0, weight_ul=0.0, weight_vocab=1.0, smooth=0.0, margin=None):
    def loss(model, examples):
        logits, targets = read_logits(model, examples)
        place = (firsts[None] == targets[:, None]).int().argmax(1)
        total = weight_vocab * F.cross_entropy(logits, targets, label_smoothing=0.0)
        own = logits[:, firsts]
        if weight_label:
            total = total + weight_label * F.cross_entropy(own, place, label_smoothing=smooth)
        if weight_ul:
            p = logits.softmax(1)[:, firsts]
            wrong = -torch.log1p(-p.clamp(max=1 - 1e-6))
            wrong = wrong.scatter(1, place[:, None], 0.0)
            total = total + weight_ul * wrong.sum(1).mean() / 1.0
        return total
    return loss

class Enough(Exception): pass

class Sam:
    def __init__(self, rho, start=0.0): self.rho = rho
    def begin(self, parameters, losses): self.p = list(parameters)
    def backward(self, loss):
        value = loss(); value.backward()
        g = [p.grad.clone() for p in self.p]; n = torch.stack([x.norm() for x in g]).norm()
        with torch.no_grad():
            for p, x in zip(self.p, g): p.add_(x, alpha=float(self.rho / (n + 1e-12)))
        for p in self.p: p.grad = None
        loss().backward()
        with torch.no_grad():
            for p, x in zip(self.p, g): p.sub_(x, alpha=float(self.rho / (n + 1e-12)))
        return value.item()

# variant -> dict(config, loss, evals)
B = dict(config=dict(max_steps=60), evals=("last",))
V = {
 "base60": B,
 "base30": {**B, "config": dict(max_steps=30)},
 "base120": {**B, "config": dict(max_steps=120)},
 "base240": {**B, "config": dict(max_steps=240)},
 "default": {**B, "config": dict(), "evals": ("last", "stop0.1", "stop0.03")},
 "label60": {**B, "loss": dict(weight_label=1.0)},
 "label3_60": {**B, "loss": dict(weight_label=3.0)},
 "labelonly60": {**B, "loss": dict(weight_label=1.0, weight_vocab=0.0)},
 "label120": {**B, "loss": dict(weight_label=1.0), "config": dict(max_steps=120)},
 "labelul60": {**B, "loss": dict(weight_label=1.0, weight_ul=1.0)},
 "smooth60": {**B, "loss": dict(weight_label=1.0, smooth=0.1)},
 "lr2_60": {**B, "config": dict(max_steps=60, learning_rate=2e-3)},
 "lr05_60": {**B, "config": dict(max_steps=60, learning_rate=5e-4)},
 "sam60": {**B, "sam": 0.02},
 "sam05_60": {**B, "sam": 0.05},
 "decay60": {**B, "decay": 10.0},
 "null60": {**B, "null": 10},
 "demos60": {**B, "demos": 0.5, "evals": ("last", "demo")},
 "based60": {**B, "evals": ("last", "demo")},
}
V["stop"] = {**B, "schedule": "constant", "config": dict(max_steps=240), "until": 0.02, "evals": ("half0.1", "half0.05", "half0.02")}
V["linear60"] = {**B, "schedule": "linear"}
V["const60"] = {**B, "schedule": "constant", "evals": ("half",)}

def nulls(task, shots, seed):
    free = ["N/A", "[MASK]", "-"]
    words = [w for e in shots for w in e.text.split()]
    r = random.Random(f"{seed}/domain"); length = max(1, round(len(words) / len(shots)))
    return free, [" ".join(r.choice(words) for _ in range(length)) for _ in range(10)]

def run(loaded, name, task_name, seed, cache):
    v = V[name]; model, tok = loaded.model, loaded.tokenizer
    if task_name not in cache:
        data = load_task(TASKS[task_name], offline=True)
        cache[task_name] = data, class_balanced(data.test, data.task.labels, 200, 42)
    data, tested = cache[task_name]; task = data.task
    shots = few_shot(data.train, task.labels, 5, seed).examples
    config = TrainingConfig(seed=seed, step_ratio=0.0, sharpness=0.0, **v["config"])
    enc = Encoder(tok, task, model_window(model)); assert not scores_whole_words(enc.labels)
    firsts = torch.tensor([w[0] for w in enc.labels.values()])
    free, domain = nulls(task, shots, seed)
    snaps, records = [], []
    try:
        params = tune_norms(model)
        origin = [p.detach().clone() for p in params]
        started = time.perf_counter(); cpu = time.process_time()
        if v.get("null"):
            null_ids = [L.EncodedExample(tuple(enc.encode_prompt(t)), (int(firsts[0]),)) for t in free + domain[:5]]
            opt = torch.optim.AdamW(params, lr=3e-4, weight_decay=0)
            model.eval()
            for _ in range(v["null"]):
                opt.zero_grad(); lg, _t = read_logits(model, null_ids)
                (-lg[:, firsts].log_softmax(1).mean()).backward(); opt.step()
        ce = combined(firsts, **v["loss"]) if "loss" in v else plain_ce
        if v.get("demos"):
            known = {L.encode_example(enc, e): e for e in shots}; rng = random.Random(f"{seed}/demos"); inner = ce
            def ce(model, examples):
                if rng.random() >= v["demos"]: return inner(model, examples)
                new = []
                for x in examples:
                    e = known[x]; by = {}
                    for o in shots:
                        if o is not e: by.setdefault(o.label, []).append(o)
                    chosen = [rng.choice(o) for o in by.values()]; rng.shuffle(chosen)
                    ids = enc.encode_demonstrations(chosen)
                    new.append(L.EncodedExample((*ids, *enc.encode_prompt(e.text, demonstrations=ids)), x.targets))
                return inner(model, new)
        trainer.cross_entropy = ce
        if v.get("schedule"):
            def lr(step, total, c):
                warm = math.ceil(c.warmup * total)
                if step < warm: return c.learning_rate * (step + 1) / warm
                return c.learning_rate * (1.0 if v["schedule"] == "constant" else 1 - (step - warm) / max(1, total - warm))
            trainer.learning_rate = lr
        def progress(record, total):
            records.append(record)
            if v.get("decay"):
                with torch.no_grad():
                    for p, o in zip(params, origin): p.lerp_(o, min(1.0, record.learning_rate * v["decay"]))
            snaps.append([p.detach().clone() for p in params])
            per = math.ceil(len(shots) / 4)
            if v.get("until") and len(records) >= per and sum(r.loss for r in records[-per:]) / per < v["until"]: raise Enough
        try: train(model, enc, shots, config, progress=progress, guidance=Sam(v["sam"]) if v.get("sam") else None)
        except Enough: pass
        fit_seconds, fit_cpu = time.perf_counter() - started, time.process_time() - cpu
        losses = [round(r.loss, 4) for r in records]
        out = {}
        def put(values):
            with torch.no_grad():
                for p, x in zip(params, values): p.copy_(x)
        def mean(part): return [torch.stack(xs).mean(0) for xs in zip(*part)]
        for e in v["evals"]:
            n = len(snaps); extra = {}
            if e in ("last", "demo"): put(snaps[-1])
            elif e.startswith("half0"):
                tau = float(e[4:]); per = math.ceil(len(shots) / 4)
                k = next((i + 1 for i in range(per - 1, n) if sum(losses[i - per + 1:i + 1]) / per < tau), n)
                put(mean(snaps[k // 2:k])); extra["stopped"] = k
            elif e == "half": put(mean(snaps[n // 2:]))
            elif e.startswith("avg"): k = int(e[3:]); put(mean(snaps[k // 2:k]))
            elif e.startswith("stop"):
                tau = float(e[4:]); per = math.ceil(len(shots) / 4)
                k = next((i + 1 for i in range(per - 1, n) if sum(losses[i - per + 1:i + 1]) / per < tau), n)
                put(mean(snaps[k - per:k])); extra["stopped"] = k
            s = Scorer(model, tok, task, demonstrations=shots if e == "demo" else ())
            rd = lambda t: [[round(x, 5) for x in row] for row in t.tolist()]
            lp = s.log_probabilities([x.text for x in tested])
            out[e] = {"test": rd(lp), **extra}
            if e != "demo":
                out[e] |= {"free": rd(s.log_probabilities(free)), "domain": rd(s.log_probabilities(domain))}
            truth = [task.labels.index(x.label) for x in tested]
            hit = (lp.argmax(1) == torch.tensor(truth)).float().mean().item()
            nll = -lp[range(len(truth)), truth].mean().item()
            print(f"{time.strftime('%H:%M:%S')} {name} {task_name} {seed} {e}: acc {hit:.3f} nll {nll:.3f} fit {fit_seconds:.0f}s cpu {fit_cpu:.0f} {extra}", flush=True)
        return {"variant": name, "task": task_name, "seed": seed, "evals": out, "truth": truth, "losses": losses, "drift": records[-1].drift,
                "fit_seconds": round(fit_seconds, 2), "fit_cpu": round(fit_cpu, 2)}
    finally:
        trainer.cross_entropy = plain_ce; trainer.learning_rate = real_lr
        restore_norms(model)
real_lr = trainer.learning_rate

def main():
    loaded = load_model(None, dtype="bfloat16", device="cpu", offline=True); cache = {}
    claims = HERE / "claims"; claims.mkdir(exist_ok=True)
    while True:
        if (HERE / "stop3").exists(): return
        todo = None
        for line in (HERE / "queue.txt").read_text().splitlines():
            if not line.strip() or line.startswith("#"): continue
            name, seeds, tasks = (line.split() + ["all"])[:3]
            for seed in map(int, seeds.split(",")):
                for t in (TASKS if tasks == "all" else tasks.split(",")):
                    c = claims / f"{name}-{t}-{seed}"
                    if todo is None and not c.exists():
                        try: c.touch(exist_ok=False); todo = (name, t, seed)
                        except FileExistsError: pass
        if todo is None: time.sleep(10); continue
        try:
            r = run(loaded, *todo, cache)
            with OUT.open("a") as f: f.write(json.dumps(r) + "\n")
        except Exception: traceback.print_exc()
main()
