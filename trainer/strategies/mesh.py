"""The ranks of a run as a grid: who holds which part of the model, and who reads the same samples.

Ranks of one tensor-parallel group are neighbours (they talk most), then those of one sharding group, and replicas of
the whole model are farthest apart: with as many ranks per replica as a node has devices, only they talk across nodes.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Layout:
    """`world` = `replicate` x `shard` x `tensor` ranks."""

    world: int
    replicate: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.replicate < 1 or self.tensor < 1 or self.world % (self.replicate * self.tensor):
            raise ValueError(
                f"strategy.replicate={self.replicate} x strategy.tensor={self.tensor} does not divide {self.world} ranks"
            )

    @property
    def shard(self) -> int:
        return self.world // (self.replicate * self.tensor)

    @property
    def data_parallel(self) -> int:
        """Number of groups that read different samples."""
        return self.world // self.tensor

    def data_rank(self, rank: int) -> int:
        """Which of them a rank belongs to."""
        return rank // self.tensor


@dataclass(frozen=True)
class Meshes:
    """`data`: over which FSDP shards, (replicate, shard) with replicas, else (shard); `tensor`: None for one device."""

    data: DeviceMesh
    tensor: DeviceMesh | None


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """The meshes of this rank. All ranks call it, in the same order as other creations of groups."""
    names = ("replicate", "shard", "tensor")
    sizes = (layout.replicate, layout.shard, layout.tensor)
    kept = [i for i in range(3) if names[i] == "shard" or sizes[i] > 1]
    mesh = init_device_mesh(device_type, tuple(sizes[i] for i in kept), mesh_dim_names=tuple(names[i] for i in kept))
    data = tuple(names[i] for i in kept if names[i] != "tensor")
    flat = mesh if mesh.ndim == len(data) else mesh[data if len(data) > 1 else data[0]]
    return Meshes(flat, mesh["tensor"] if layout.tensor > 1 else None)
