"""Planted copies among scenes of the world (resized, recompressed, cropped by 5 %): recall and precision by threshold.

python tests/bench/data_dedup.py [scenes]; as many copies of each kind as a tenth of the scenes.
"""

import json
import sys
from pathlib import Path

import numpy as np

from data_pipeline.curation.dedup import _hash_perceptually
from data_pipeline.curation.hash_matching import find_first_near
from data_pipeline.curation.semantic import SemanticDedup

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    from test_data_pipeline_dedup import embedding_table, first, planted, scores

    scenes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    images, origin_N = planted(scenes, scenes // 10, seed=1)
    table = embedding_table(images)
    places = [("s", n) for n in range(len(table))]
    hash_N = np.array([_hash_perceptually(image) for image in images], np.uint64)
    lines = [("perceptual, bits", distance, find_first_near(hash_N, distance)) for distance in (0, 2, 4, 6, 8, 12)]
    for similarity in (0.95, 0.9, 0.85, 0.8):
        found = np.array(first(SemanticDedup(similarity), places, lambda _: table))
        lines.append(("embedding, similarity", similarity, found))
    for verify in (6.0, 9.0, 12.0, 15.0, 18.0, 22.0):
        found = np.array(first(SemanticDedup(0.8, verify), places, lambda _: table))
        lines.append(("embedding 0.8, verified within", verify, found))
    for name, value, first_N in lines:
        recall, precision = scores(first_N, origin_N)
        print(json.dumps({name: value, "recall": round(float(recall), 3), "precision": round(float(precision), 3)}))


if __name__ == "__main__":
    main()
