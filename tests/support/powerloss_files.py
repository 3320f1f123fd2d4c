"""The simulated file system lives with the simulator, which is shipped."""

from chaos.simulation.files import (
    PowerLost as PowerLost,
)
from chaos.simulation.files import (
    SimulatedFile as SimulatedFile,
)
from chaos.simulation.files import (
    SimulatedFiles as SimulatedFiles,
)
from chaos.simulation.files import (
    any_bit as any_bit,
)
