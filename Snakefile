# Runs, in order, what is left of one declaration; `make study` calls it, docs/experiments.md says how on a cluster.
# What is done and what is left is decided by tcp_core.study.experiments alone. The files that Snakemake makes are mere
# marks in build/executed/: it deletes what it is about to make, so it must not own results.
import shlex
import sys

from snakemake.exceptions import WorkflowError

from tcp_core.study.experiments import DeclarationError, read, table

places = {name: config.get(name) for name in ("data", "weights", "runs")}
try:
    # a job on another machine reads the declaration again, but for the slow part of the checks
    study = read(config["experiments"], **places, budgets=workflow.is_main_process)
except DeclarationError as error:
    raise WorkflowError(str(error)) from None
todo = study.todo()
cores = workflow.resource_settings.nodes or workflow.cores or 1


def mark(key):
    return f"build/executed/{study.path.stem}/{key}.done"


if workflow.is_main_process:
    for key in todo:
        Path(mark(key)).unlink(missing_ok=True)


def command(wildcards):
    options = [f"--{name}={place}" for name, place in places.items() if place]
    python = [sys.executable, "-m", "tcp_core.study.experiments", "run", str(study.path), wildcards.key]
    return shlex.join([*python, *options, f"--cores={cores}"])


rule all:
    input:
        [mark(key) for key in todo],


rule run:
    input:
        lambda wildcards: [mark(key) for key in [study.runs[wildcards.key].needs] if key in todo],
    output:
        touch(mark("{key}")),
    params:
        command=command,
    threads: lambda wildcards: study.runs[wildcards.key].values.get("threads") or 1
    shell:
        "OMP_NUM_THREADS={threads} {params.command}"


onstart:
    print(table(study, cores=cores))


onsuccess:
    print(table(study, cores=cores))


onerror:
    print(table(study, cores=cores))
