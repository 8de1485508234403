from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo_ft.records import QUESTION_TYPES
from evaluation import pages
from evaluation.pages import (
    DETECTION_LABELS,
    EXPERT_LABELS,
    hundredfold,
    interval_text,
    percent,
    share_text,
    text_table,
)


def print_report(report: Mapping[str, Any]) -> None:
    """The strict table with intervals and counts, on stdout."""
    counts, tables, spread = report["counts"], report["tables"], report["intervals"]["strict"]
    print(f"{report['name']}: {summary(counts)}\n")
    rows: list[tuple[str, ...]] = [
        ("percent", "strict", "95 % interval", "official", "questions", "unparsed", "failed")
    ]
    for kind in (*QUESTION_TYPES, "Average"):
        of_kind = counts if kind == "Average" else report["kinds"][kind]
        if of_kind["questions"]:
            strict, official = tables["strict"]["Average"][kind], tables["official"]["Average"][kind]
            figures = percent(strict), interval_text(kind, spread["Average"][kind]), percent(official)
            rows.append((kind, *figures, *(str(of_kind[key]) for key in ("questions", "unparsed", "failed"))))
    print(text_table(rows))
    datasets = [name for name in tables["strict"] if name != "Average"]
    if len(datasets) > 1:
        rows = [("average by dataset", "strict", "95 % interval", "official")]
        for name in datasets:
            strict, official = tables["strict"][name]["Average"], tables["official"][name]["Average"]
            rows.append((name, percent(strict), interval_text("Average", spread[name]["Average"]), percent(official)))
        print("\n" + text_table(rows))
    if "All" in report["detection"]:
        found = report["detection"]["All"]
        rows = [("detection, from 0 to 1", "figure", "95 % interval")]
        known = [(key, label) for key, label in DETECTION_LABELS.items() if found[key] is not None]
        rows += [
            (label, share_text(found[key]), interval_text("AUROC", found["intervals"][key])) for key, label in known
        ]
        rows.append(("average precision", share_text(found["average_precision"]), ""))
        print(f"\n{text_table(rows)}\nP(defect) is known of {found['scored']} of {found['images']} images")
    if report["calibration"]:
        print_calibration(report["calibration"])
    if report["two_ways"]:
        found = report["two_ways"]["Average"]
        agreement, spread = 100 * found["agreement"], found["interval"] and [100 * bound for bound in found["interval"]]
        print(
            f"the text names the most probable option in {percent(agreement)} % of {found['questions']} questions "
            f"({interval_text('Average', spread)}); by that option the average is {percent(found['logits'])}, by the text "
            f"{percent(found['text'])}"
        )
    if report["option_order"]:
        print_option_order(report["option_order"])
    if report["experts"]:
        print_experts(report["experts"])


def print_experts(found: Mapping[str, Any]) -> None:
    """What the experts before the decision were worth, on stdout."""
    if "unavailable" in found:
        print(f"\nthe experts before the decision cannot be scored: {found['unavailable']}")
        return
    rows = [("experts before the decision", "%", "95 % interval", "by chance", "texts", "unread")]
    for name, label in EXPERT_LABELS.items():
        if name in found["figures"]:
            one = found["figures"][name]
            spread = interval_text("Average", one["interval"] and [100 * bound for bound in one["interval"]])
            value, chance = hundredfold(one["value"]), hundredfold(one["chance"])
            rows.append((label, value, spread, chance, str(one["texts"]), str(one["unread"])))
    print("\n" + text_table(rows))
    if found["unreadable"]:
        print(f"{len(found['unreadable'])} cases are left out where it takes images ({found['unreadable'][0]})")


def print_option_order(found: Mapping[str, Any]) -> None:
    """How often the answer kept its option, and how often each letter was chosen, on stdout."""
    print(
        f"\nin every order of its options the same one is chosen in {percent(100 * found['consistent'])} % of "
        f"{found['questions']} questions\n"
    )
    rows = [("letter, of so many options", "chosen, %", "right, %", "found where right, %")]
    for one in found["letters"]:
        recall = None if one["recall"] is None else 100 * one["recall"]
        shares = percent(100 * one["chosen"]), percent(100 * one["right"]), percent(recall)
        rows.append((f"{one['letter']} of {one['options']}", *shares))
    print(text_table(rows))


def print_calibration(found: Mapping[str, Any]) -> None:
    """Temperature, calibration error and the thresholds' figures, on stdout."""
    fitted, error, loss = found["validation"], found["expected_calibration_error"], found["log_loss"]
    print(
        f"\nP(defect) calibrated on {fitted['normal']} normal and {fitted['defective']} defective images of "
        f"{found['provenance']['run']}: temperature {found['temperature']:.3g}; expected calibration error "
        f"{share_text(error['before'])} before, {share_text(error['after'])} after; log loss {share_text(loss['before'])} "
        f"before, {share_text(loss['after'])} after\n"
    )
    rows: list[tuple[str, ...]] = [
        ("threshold on P(defect)", "at", "figure", "validation", "this run", "95 % interval")
    ]
    for name, one in found["thresholds"].items():
        label, at = pages.THRESHOLD_LABELS[name].format(found["stated_false_alarms"]), share_text(one["threshold"])
        for key, value in one["test"].items():
            shown = (
                share_text(one["validation"][key]),
                share_text(value),
                interval_text("AUROC", one["intervals"].get(key)),
            )
            rows.append((label, at, "F1" if key == "f1" else key.replace("_", " "), *shown))
            label = at = ""
    print(text_table(rows))


def summary(counts: Mapping[str, Any]) -> str:
    """One line: how many questions, images, unparsed and failed answers."""
    return (
        f"{counts['questions']} questions about {counts['images']} images ({counts['normal']} normal, "
        f"{counts['defective']} defective); {counts['unparsed']} answers unparsed "
        f"({100 * counts['unparsed_share']:.1f} %), {counts['failed']} failed"
    )
