"""What rounds of max-pooling leave of a component: ids that spread one step a round, as in the published code.

Each voxel begins with its own id, its index in the sample plus one, and in each round takes the largest of its 26
neighbours and itself. Only what changed in one round can change anything in the next.
"""

import numpy as np

from . import compiled
from .activation import Indices, Rows


@compiled
def propagate(front: Indices, ids: Rows, shape: tuple[int, ...], rounds: int) -> None:
    """Write the ids of whole components, whose voxels `front` lists and uses up; ids of background are 0."""
    _, depth, height, width = shape
    plane, count = height * width, len(front)
    coming, brought, waits = np.empty_like(front), np.empty(count, np.int32), np.zeros(len(ids), np.bool_)
    for place in range(count):
        ids[front[place]] = front[place] % (depth * plane) + 1
    for _ in range(rounds):
        for place in range(count):
            brought[place] = ids[front[place]]  # what the round before left
            waits[front[place]] = False
        changed = 0
        for place in range(count):
            line = front[place] // width
            d, h, w = line // height % depth, line % height, front[place] - line * width
            for dd in range(max(-1, -d), min(2, depth - d)):
                for dh in range(max(-1, -h), min(2, height - h)):
                    for dw in range(max(-1, -w), min(2, width - w)):
                        voxel = front[place] + dd * plane + dh * width + dw
                        if 0 < ids[voxel] < brought[place]:
                            ids[voxel] = brought[place]
                            coming[changed] = voxel
                            changed += not waits[voxel]
                            waits[voxel] = True
        front, coming, count = coming, front, changed
