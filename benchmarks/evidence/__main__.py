"""Run every experiment of the evidence page, judge the claims by what comes out, and write ``docs/evidence.md``.

    python benchmarks/evidence                        # all of it: needs pip install -e '.[dev,mnist]'
    python benchmarks/evidence --only noise bits      # these anew, the rest as kept in build/evidence
    python benchmarks/evidence --only                 # the page alone, from what is kept

Two experiments run at a time, each with one thread. Exit code 1 if a command failed; the page is not written then.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from experiments import EXPERIMENTS, ROOT, ExperimentError, Result, kept, run
from page import write
from rich.console import Console

from onward.evidence.plots import require_matplotlib


def main(argv: list[str] | None = None) -> int:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [experiment.key for experiment in EXPERIMENTS]
    parser.add_argument("--only", nargs="*", choices=keys, metavar="NAME", help="run these; the others as kept")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", metavar="FOLDER", help="where the page goes")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "evidence", metavar="FOLDER", help="raw results")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="experiments that run at a time")
    options = parser.parse_args(argv)
    require_matplotlib()
    console = Console(highlight=False)
    figures = options.output / "evidence"
    for folder in (options.keep, figures):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = keys if options.only is None else options.only
    results: dict[str, Result] = {}
    for experiment in EXPERIMENTS:
        if experiment.key not in chosen:
            found = kept(experiment, options.keep)
            if found is None:
                parser.error(
                    f"--only leaves out {experiment.key}, of which {options.keep} has no result of this command."
                )
            results[experiment.key] = found
    begun = time.perf_counter()
    with ThreadPoolExecutor(options.at_once) as pool:
        started = {pool.submit(run, one, options.keep, figures): one for one in EXPERIMENTS if one.key in chosen}
        try:
            for done in as_completed(started):
                result = done.result()
                results[result.key] = result
                console.print(f"{result.key}: {result.seconds:.0f} s", style="dim")
        except ExperimentError as error:
            pool.shutdown(cancel_futures=True)
            console.print(str(error), style="bold red", markup=False)
            return 1
    everything = set(chosen) == set(keys)
    findings = write(results, options.output, (time.perf_counter() - begun) / 60 if everything else None)
    for text, finding in findings.items():
        console.print(f"[bold]{finding.verdict:14}[/bold] {text}")
    console.print(f"wrote {options.output / 'evidence.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
