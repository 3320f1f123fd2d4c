"""The disk that loses power lives with the simulator, which is shipped."""

from chaos.simulation.disk import (
    SECTOR_BYTES as SECTOR_BYTES,
)
from chaos.simulation.disk import (
    Change as Change,
)
from chaos.simulation.disk import (
    Disk as Disk,
)
from chaos.simulation.disk import (
    FileKey as FileKey,
)
from chaos.simulation.disk import (
    FileState as FileState,
)
from chaos.simulation.disk import (
    Loss as Loss,
)
from chaos.simulation.disk import (
    NameChange as NameChange,
)
from chaos.simulation.disk import (
    Truncate as Truncate,
)
from chaos.simulation.disk import (
    Write as Write,
)
from chaos.simulation.disk import (
    apply_change as apply_change,
)
