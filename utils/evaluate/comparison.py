"""Two result files on the same items: difference, interval, test and the ids whose answer changed; several
pairs, with Holm.

Items that are an error in either file are left out and counted; files with other items or other golds are
refused.
"""
from utils.evaluate.scoring import VERDICTS
from utils.items import group_of
from utils.jsonl import DataError, read_rows
from utils.stats import cluster_bootstrap, holm, mcnemar_exact, paired_interval, sign_flip


def read_results(path: str) -> list[dict]:
    """Read a result file of evaluate.py; DataError for a row whose verdict, benchmark or group is none."""
    rows = read_rows(path, {"id": str, "verdict": str}, hint="evaluate.py writes it")
    for row in rows:
        for name in ("benchmark", "group_id"):
            if not isinstance(row.get(name), (str, type(None))):
                raise DataError(
                    f"{path}: id {row['id']!r}: {name} {str(row[name])[:40]!r}, expected a string or null")
        if row["verdict"] not in VERDICTS:
            raise DataError(
                f"{path}: id {row['id']!r}: verdict {row['verdict'][:40]!r}, expected one of {', '.join(VERDICTS)}")
    return rows


def read_pair(paths: list[str]) -> tuple[list[tuple[dict, dict]], int]:
    """Return the pairs of results that are no error, in the first file's order, and how many were left out.
    """
    where, sides = f"--compare {' '.join(paths)}", []
    for path in paths:
        sides.append({row["id"]: row for row in read_results(path)})
    if set(sides[0]) != set(sides[1]):
        odd = sorted(set(sides[0]) ^ set(sides[1]))
        raise DataError(
            f"{where}: {len(odd)} items stand in one file only ({odd[0]}, ...); expected the same items")
    pairs = [(row, sides[1][name]) for name, row in sides[0].items()]
    if other := [one["id"] for one, two in pairs if one.get("gold") != two.get("gold")]:
        raise DataError(
            f"{where}: {len(other)} items have another gold ({other[0]}, ...); expected the same items")
    pairs = [pair for pair in pairs if "error" not in (pair[0]["verdict"], pair[1]["verdict"])]
    if not pairs:
        raise DataError(f"{where}: no item is answered in both; expected at least one")
    return pairs, len(sides[0]) - len(pairs)


def difference(pairs: list[tuple[dict, dict]]) -> dict:
    """Return what changes from the first to the second of each pair; verdicts are the strict ones.

    "p" is exact McNemar's ("mcnemar") where every item is its own group, else that of a test that flips the
    signs of whole groups ("sign_flip"); None for items that are all of one group. "ci95" is
    utils.stats.paired_interval.
    """
    n, groups = len(pairs), [group_of(one) for one, _ in pairs]
    right = [[int(row["verdict"] == "correct") for row in side] for side in zip(*pairs)]
    changes = [after - before for before, after in zip(*right)]
    lost, won = ([one["id"] for (one, _), change in zip(pairs, changes) if change == sign]
                 for sign in (-1, 1))
    grouped = len(set(groups)) < n
    result = {"n": n, "groups": len(set(groups)), "accuracy": [sum(side) / n for side in right],
              "difference": (len(won) - len(lost)) / n, "ci95": paired_interval(*right, groups, level=0.95),
              "test": "sign_flip" if grouped else "mcnemar", "mcnemar_p": mcnemar_exact(len(lost), len(won)),
              "right_to_wrong": lost, "wrong_to_right": won}
    result["p"] = result["mcnemar_p"]
    if grouped:
        result["p"] = sign_flip(changes, groups) if len(set(groups)) > 1 else None
    if 1 < len(set(groups)) < n:
        result["ci95_clustered"] = cluster_bootstrap(changes, groups, level=0.95)
    return result


def compare(paths: list[str]) -> dict:
    """Return `difference` of two files, with "errors" left out, whether their prompts differ, and a part a
    benchmark.

    With several benchmarks, "benchmarks" holds each with Holm's adjusted p as "p_holm".
    """
    pairs, n_errors = read_pair(paths)
    result = {"files": list(paths), **difference(pairs), "errors": n_errors, "incomplete": n_errors > 0,
              "other_prompts": sum(one.get("prompt_sha") != two.get("prompt_sha") for one, two in pairs)}
    names = list(dict.fromkeys(one.get("benchmark") for one, _ in pairs))
    if len(names) > 1:
        result["benchmarks"] = {name: difference([pair for pair in pairs if pair[0].get("benchmark") == name])
                                for name in names}
        adjust(list(result["benchmarks"].values()))
    return result


def compare_all(paths: list[str]) -> dict:
    """Return `compare` of the two files, or {"comparisons": [...]} of the first and second, third and fourth,
    and so on.

    Several are claimed together, so that each has Holm's adjusted p.
    """
    if len(paths) == 2:
        return compare(paths)
    if len(paths) % 2:
        raise DataError(f"--compare: {len(paths)} files, expected pairs of them (A B, or A1 B1 A2 B2 ...)")
    found = [compare(paths[i:i + 2]) for i in range(0, len(paths), 2)]
    adjust(found)
    return {"comparisons": found}


def adjust(parts: list[dict]) -> None:
    """Give each part with a p its Holm-adjusted "p_holm", in place."""
    tested = [part for part in parts if part["p"] is not None]
    for part, p in zip(tested, holm([part["p"] for part in tested]) if tested else (), strict=True):
        part["p_holm"] = p


def describe(result: dict) -> str:
    """Return a comparison in one line for people."""
    low, high = result["ci95"]
    return (f"n {result['n']} | {result['accuracy'][0]:.1%} -> {result['accuracy'][1]:.1%} | "
            f"{100 * result['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) | {result['test']} p "
            f"{'-' if result['p'] is None else format(result['p'], '.4g')} | {len(result['right_to_wrong'])} lost, "
            f"{len(result['wrong_to_right'])} won")
