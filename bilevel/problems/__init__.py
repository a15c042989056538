"""Ready problems: losses, networks, and `setup(device="cpu", seed=0, ...) -> (problem, outer, inner, batches)`.

| module | inner variable | outer variable | data |
| --- | --- | --- | --- |
| `quadratic` | a vector | a vector | none: everything in closed form |
| `step_size` | a vector and its scale | a step size | none: everything in closed form |
| `ridge` | linear weights | a log-penalty for each feature | diabetes (scikit-learn) |
| `hypercleaning` | a perceptron | a weight for each example | digits (scikit-learn), 40 % of the labels corrupted |
| `language` | a transformer | a weight for each sequence | Python's own library as text, half of it noise |
| `fewshot` | a convolutional network for each task | its initialization | characters drawn from fonts (matplotlib) |

`logarithmic` makes, of a homogeneous problem, that of its logarithm.

The networks stand alone: `conv4` is that of `fewshot`, `transformer` that of `language`. The data are in
`bilevel.data`; the parts of the few-shot ones can be imported from here as well.
"""

from bilevel.data import episodes as episodes
from bilevel.data import folders as folders
from bilevel.data import glyphs as glyphs
from bilevel.data import imageset as imageset
from bilevel.problems import conv4 as conv4
from bilevel.problems import fewshot as fewshot
from bilevel.problems import hypercleaning as hypercleaning
from bilevel.problems import language as language
from bilevel.problems import logarithmic as logarithmic
from bilevel.problems import quadratic as quadratic
from bilevel.problems import ridge as ridge
from bilevel.problems import step_size as step_size
from bilevel.problems import transformer as transformer
