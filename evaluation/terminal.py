"""Tables and summaries of reports and comparisons, printed on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo_ft.metrics.comparison import ALL_QUESTIONS
from echo_ft.records import QUESTION_TYPES, ROBUSTMAD_TYPES
from evaluation.formatting import (
    ALARM_LABELS,
    BOX_LABELS,
    DETECTION_LABELS,
    DETECTION_METRICS,
    EXPERT_LABELS,
    GATE_LABELS,
    THRESHOLD_LABELS,
    UNPARSED_LABEL,
    box_interval_text,
    box_text,
    gate_cells,
    gate_notes,
    interval_text,
    metric_text,
    mmad_counts,
    p_text,
    percent,
    share_interval_text,
    share_percent,
    share_text,
    signed,
    text_table,
    unparsed_or_failed,
)


def print_report(report: Mapping[str, Any]) -> None:
    """Print the strict table with intervals and counts, and the other parts of a report that are not empty."""
    counts, tables, intervals = report["counts"], report["tables"], report["intervals"]["strict"]
    print(f"{report['name']}: {summary(counts)}\nprotocol: {report['protocol']}")
    rows: list[tuple[str, ...]] = [("percent", "strict", "95% interval", "official", "questions", "unparsed", "failed")]
    for kind in (*QUESTION_TYPES, "Average"):
        own = report["kinds"].get(kind) or mmad_counts(report["kinds"])
        if own["questions"]:
            strict, official = tables["strict"]["Average"][kind], tables["official"]["Average"][kind]
            scores = percent(strict), interval_text(kind, intervals["Average"][kind]), percent(official)
            rows.append((kind, *scores, *(str(own[key]) for key in ("questions", "unparsed", "failed"))))
    if len(rows) > 1:
        print("\n" + text_table(rows))
    datasets = [name for name in tables["strict"] if name != "Average"]
    if len(datasets) > 1 and len(rows) > 1:
        rows = [("average by dataset", "strict", "95% interval", "official")]
        for name in datasets:
            strict, official = tables["strict"][name]["Average"], tables["official"].get(name, {}).get("Average")
            interval = interval_text("Average", intervals[name]["Average"])
            rows.append((name, percent(strict), interval, percent(official)))
        print("\n" + text_table(rows))
    if report["robustmad"]:
        print_robustmad(report)
    others = {kind: own for kind, own in report["other_types"].items() if kind not in ROBUSTMAD_TYPES.values()}
    if others:
        print_other_types(others)
    if "All" in report["detection"]:
        print_detection(report["detection"]["All"])
        print_alarms(report["alarms"]["All"])
    if report["boxes"]:
        print_boxes(report["boxes"])
    if report["calibration"]:
        print_calibration(report["calibration"])
    if report["gate"]:
        print_gate(report["gate"])
    if report["two_ways"]:
        print_agreement(report["two_ways"]["Average"])
    if report["option_order"]:
        print_option_order(report["option_order"])
    if report["experts"]:
        print_experts(report["experts"])


def print_robustmad(report: Mapping[str, Any]) -> None:
    """Print RobustMAD's tables: the authors' scores, and the strict ones with intervals."""
    guessed, intervals = report["robustmad"]["guessed"], report["robustmad"]["intervals"]
    rows: list[tuple[str, ...]]
    rows = [("RobustMAD, percent", "authors", "general", "domain", "strict", "95% interval", "guessed")]
    for row, official in report["tables"]["robustmad"].items():
        scores = (percent(official[column]) for column in ("Average", "general", "domain"))
        strict, interval = report["tables"]["robustmad_strict"][row]["Average"], intervals[row].get("Average")
        rows.append((row, *scores, percent(strict), interval_text(row, interval), str(guessed[row]["answers"])))
    print("\n" + text_table(rows))


def print_other_types(other_types: Mapping[str, Any]) -> None:
    """Print the strict scores of the question types that are not part of MMAD."""
    rows: list[tuple[str, ...]]
    rows = [("other types, percent", "strict", "95% interval", "questions", "unparsed", "failed")]
    for kind, own in other_types.items():
        counts = (str(own[key]) for key in ("questions", "unparsed", "failed"))
        rows.append((kind, percent(own["strict"]), interval_text(kind, own["interval"]), *counts))
    print("\n" + text_table(rows))


def summary(counts: Mapping[str, Any]) -> str:
    """Summarise the questions, the images, and the unparsed and failed answers in one line."""
    return (
        f"{counts['questions']} questions about {counts['images']} images ({counts['normal']} normal, "
        f"{counts['defective']} defective); {counts['unparsed']} unparsed answers "
        f"({share_percent(counts['unparsed_share'])}%), {counts['failed']} failed"
    )


def print_detection(scores: Mapping[str, Any]) -> None:
    """Print how well defective images are detected."""
    rows = [("detection, from 0 to 1", "value", "95% interval")]
    rows += [
        (label, share_text(scores[key]), interval_text("AUROC", scores["intervals"][key]))
        for key, label in DETECTION_LABELS.items()
        if scores[key] is not None
    ]
    rows.append(("average precision", share_text(scores["average_precision"]), ""))
    print(f"\n{text_table(rows)}\nP(defect) is known for {scores['scored']} of {scores['images']} images")


def print_alarms(alarms: Mapping[str, Any]) -> None:
    """Print the false alarms and the escapes of images and of parts."""
    rows: list[tuple[str, ...]] = [
        (
            "false alarms and escapes, %",
            "false alarms",
            "95% interval",
            "of good",
            "escapes",
            "95% interval",
            "of defective",
        )
    ]
    for way, label in ALARM_LABELS.items():
        for by, found in alarms.get(way, {}).items():
            cells = []
            for rate, total in (("false_alarms", "good"), ("escapes", "defective")):
                interval = share_interval_text(found["intervals"][rate])
                cells += [share_percent(found[rate]), interval, f"{found[total]} {by}"]
            rows.append((f"{by}, by {label}", *cells))
    print(f"\n{text_table(rows)}\na part is flagged if any of its images is; an unparsed answer counts against the run")


def print_boxes(boxes: Mapping[str, Any]) -> None:
    """Print how well the boxes of the answers overlap with those of the truth."""
    rows = [("boxes", "value", "95% interval")]
    for name, label in BOX_LABELS.items():
        figure = boxes["figures"][name]
        if figure["value"] is not None:
            rows.append((label, box_text(figure["value"], name), box_interval_text(figure["interval"], name)))
    print(
        f"\n{text_table(rows)}\n{boxes['true_boxes']} true boxes and {boxes['named_boxes']} predicted ones in "
        f"{boxes['images']} images; {boxes['unparsed']} unparsed answers, {boxes['failed']} failed"
    )


def print_calibration(fit: Mapping[str, Any]) -> None:
    """Print the temperature, the calibration error, and the scores at each threshold."""
    fitted, error, loss = fit["validation"], fit["expected_calibration_error"], fit["log_loss"]
    print(
        f"\nP(defect) calibrated on {fitted['normal']} normal and {fitted['defective']} defective images of "
        f"{fit['provenance']['run']}: temperature {fit['temperature']:.3g}; expected calibration error "
        f"{share_text(error['before'])} before, {share_text(error['after'])} after; log loss "
        f"{share_text(loss['before'])} before, {share_text(loss['after'])} after\n"
    )
    rows: list[tuple[str, ...]] = [
        ("threshold on calibrated P(defect)", "at", "metric", "validation", "this run", "95% interval")
    ]
    for name, threshold in fit["thresholds"].items():
        label = THRESHOLD_LABELS[name].format(fit["stated_false_alarms"])
        at = share_text(threshold["threshold"])
        for key, value in threshold["test"].items():
            metric = "F1" if key == "f1" else key.replace("_", " ")
            interval = interval_text("AUROC", threshold["intervals"].get(key))
            rows.append((label, at, metric, share_text(threshold["validation"][key]), share_text(value), interval))
            label = at = ""
    print(text_table(rows))


def print_gate(gate: Mapping[str, Any]) -> None:
    """Print the result for each limit, and how many more parts would settle it."""
    rows: list[tuple[str, ...]] = [("gate, %", "limit", "seen", "bounds", "parts", "verdict")]
    rows += [(GATE_LABELS[name], *gate_cells(one)) for name, one in gate["findings"].items()]
    print("\n" + text_table(rows))
    for text in gate_notes(gate):
        print(text)


def print_agreement(agreement: Mapping[str, Any]) -> None:
    """Print how often the text and the most probable option agree."""
    interval = agreement["interval"] and [100 * bound for bound in agreement["interval"]]
    print(
        f"\nthe text gives the most probable option for {share_percent(agreement['agreement'])}% of "
        f"{agreement['questions']} questions ({interval_text('Average', interval)}); strict average by text "
        f"{percent(agreement['text'])}, by probability {percent(agreement['logits'])}"
    )


def print_option_order(order: Mapping[str, Any]) -> None:
    """Print how often the answer is the same in every order of the options, and how often each letter is chosen."""
    print(
        f"\nthe answer is the same option in every order for {share_percent(order['consistent'])}% of "
        f"{order['questions']} questions\n"
    )
    rows: list[tuple[str, ...]] = [("letter, number of options", "chosen, %", "expected, %", "recall, %")]
    for letter in order["letters"]:
        shares = (share_percent(letter[key]) for key in ("chosen", "right", "recall"))
        rows.append((f"{letter['letter']} of {letter['options']}", *shares))
    print(text_table(rows))


def print_experts(experts: Mapping[str, Any]) -> None:
    """Print the scores for the experts before the decision."""
    if "unavailable" in experts:
        print(f"\nno scores for the experts before the decision: {experts['unavailable']}")
        return
    rows = [("experts before the decision", "%", "95% interval", "chance, %", "outputs", "unparsed")]
    for name, label in EXPERT_LABELS.items():
        if name in experts["figures"]:
            score = experts["figures"][name]
            interval = interval_text("Average", score["interval"] and [100 * bound for bound in score["interval"]])
            values = share_percent(score["value"]), interval, share_percent(score["chance"])
            rows.append((label, *values, str(score["texts"]), str(score["unread"])))
    print("\n" + text_table(rows))
    if experts["unreadable"]:
        count, first = len(experts["unreadable"]), experts["unreadable"][0]
        print(f"{count} cases are left out of the scores that need images (first: {first})")


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """Print the scores of all runs, their differences from the baseline, and one sentence per run."""
    runs, keys = comparison["runs"], list(comparison["runs"][0]["figures"])
    header = (cell for run in runs for cell in _run_cells(run, run["title"], "sd over runs", "95% interval"))
    rows: list[tuple[str, ...]] = [("metric", *header)]
    for key in keys:
        if any(run["figures"][key]["value"] is not None for run in runs):
            row = [key]
            for run in runs:
                score = run["figures"][key]
                value, deviation = (metric_text(key, score[name]) for name in ("value", "standard_deviation"))
                row += _run_cells(run, value, deviation, interval_text(key, score["interval"]))
            rows.append(tuple(row))
    unparsed = (cell for run in runs for cell in _run_cells(run, unparsed_or_failed(run["counts"]), "", ""))
    rows.append((UNPARSED_LABEL, *unparsed))
    print(text_table(rows))
    for run in runs:
        print(f"protocol of {run['name']}: {run['protocol']}")
    for difference in comparison["differences"]:
        print("\n" + text_table(_difference_rows(difference, comparison["baseline"], comparison["headline"], keys)))
    if comparison["boxes"]:
        print_compared_boxes(comparison["boxes"])
    print("\nAUROC, recall and specificity range from 0 to 1; all other scores are percentages. False alarms and")
    print(
        "escapes should be low. won, lost: questions that only one of the two runs answered correctly. p: exact McNemar"
    )
    print("test on these, Holm-corrected\n")
    if comparison["note"]:
        print(f"{comparison['note']}\n")
    for difference in comparison["differences"]:
        print(difference["verdict"])


def print_compared_boxes(boxes: Mapping[str, Any]) -> None:
    """Print the metrics of boxes of all runs, and their differences from the baseline."""
    runs = boxes["runs"]
    header = (cell for run in runs for cell in _run_cells(run, run["title"], "sd over runs", "95% interval"))
    rows: list[tuple[str, ...]] = [("boxes", *header)]
    for name, label in BOX_LABELS.items():
        if all(run["figures"][name]["value"] is None for run in runs):
            continue
        row = [label]
        for run in runs:
            score = run["figures"][name]
            value, deviation = (box_text(score[key], name) for key in ("value", "standard_deviation"))
            row += _run_cells(run, value, deviation, box_interval_text(score["interval"], name))
        rows.append(tuple(row))
    print("\n" + text_table(rows))
    for difference in boxes["differences"]:
        rows = [(f"{difference['run']} - {boxes['baseline']}", "difference", "95% interval")]
        for name, label in BOX_LABELS.items():
            score = difference["figures"][name]
            if score["difference"] is None:
                continue
            change = box_text(score["difference"], name, plus=True)
            rows.append((label, change, box_interval_text(score["interval"], name, plus=True)))
        print("\n" + text_table(rows))


def _run_cells(run: Mapping[str, Any], value: str, deviation: str, interval: str) -> list[str]:
    """Return the cells of a run; only groups of several runs have a column for the standard deviation."""
    return [value, deviation, interval] if len(run["members"]) > 1 else [value, interval]


def _difference_rows(
    difference: Mapping[str, Any], baseline: str, headline: str, keys: list[str]
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (f"{difference['run']} - {baseline}", "difference", "95% interval", "won", "lost", "p")
    ]
    for key in keys:
        score = difference["figures"][key]
        test = difference["mcnemar"].get(ALL_QUESTIONS if key == headline else key)
        if score["difference"] is not None:
            counts = (str(test["only_run"]), str(test["only_baseline"]), p_text(test["p_holm"])) if test else ("",) * 3
            digits = 3 if key in DETECTION_METRICS else 1
            interval = " to ".join(signed(bound, digits) for bound in score["interval"] or [None])
            rows.append((key, signed(score["difference"], digits), interval, *counts))
    return rows
