"""Totals of a ctest run: minutes per label, what was skipped, and one closing line.

Usage: summary.py BUILD/tests.xml PRESET. Counts ctest entries; skips inside pytest files are printed by pytest itself."""
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import json
import pathlib


def labels_of(build):
    """Label of each test, from ctest's own listing."""
    listing = subprocess.run(["ctest", "--show-only=json-v1"], cwd=build, capture_output=True, text=True, check=True).stdout
    out = {}
    for test in json.loads(listing)["tests"]:
        for prop in test.get("properties", []):
            if prop["name"] == "LABELS":
                out[test["name"]] = prop["value"][0]
    return out


def main(report, preset):
    build = pathlib.Path(report).parent
    labels = labels_of(build)
    minutes, counts = {}, {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = case.get("name")
        label = labels.get(name, "other")
        minutes[label] = minutes.get(label, 0.0) + float(case.get("time", 0)) / 60
        if case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
            counts["skipped"] += 1
        elif case.find("failure") is not None or case.get("status") == "fail":
            counts["failed"] += 1
            failed.append(name)
        else:
            counts["passed"] += 1
    print(f"\n{preset}: minutes per label (tests run side by side)")
    for label, value in sorted(minutes.items()):
        print(f"  {label:8s} {value:6.2f}")
    for name in failed:
        print(f"  failed: {name}")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if counts["failed"] or counts["passed"] == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
