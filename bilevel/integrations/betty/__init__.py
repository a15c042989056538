"""Our estimators inside a Betty program (https://github.com/leopard-ai/betty), in place of its own.

    from bilevel.integrations import betty

    Config(type="neumann")                                               # Betty's
    Config(type=betty.register(bl.Implicit(bl.Neumann(10, 0.1))))        # ours: the one line that changes

Nothing of Betty is imported or changed before one of these functions is called.
"""

from bilevel.integrations.betty.graph import check as check
from bilevel.integrations.betty.hook import Hook as Hook
from bilevel.integrations.betty.registration import register as register
from bilevel.integrations.betty.registration import use as use
from bilevel.integrations.betty.release import Release as Release
from bilevel.integrations.betty.release import installed as installed
