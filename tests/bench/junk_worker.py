"""A peer that writes on its standard output what is no answer. Options: late (only at the first request)."""

import json
import sys

if json.loads(sys.argv[1]).get("late"):
    print(json.dumps({"about": {"versions": {}}}), flush=True)
    sys.stdin.readline()
print("Loading weights: 100%", flush=True)
sys.stdin.readline()
