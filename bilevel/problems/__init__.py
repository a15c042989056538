"""Ready problems and their data. Importing this package imports torch only; scikit-learn, matplotlib, Pillow and numpy
are imported where needed.

Each problem module has `setup(device="cpu", seed=0, ...) -> (problem, outer, inner, batches)`:

| module | inner variable | outer variable | data |
| --- | --- | --- | --- |
| `quadratic` | a vector | a vector | none: everything in closed form |
| `ridge` | linear weights | a log-penalty for each feature | diabetes (scikit-learn) |
| `hypercleaning` | a perceptron | a weight for each training example | digits (scikit-learn), 40 % of the labels corrupted |
| `language` | a transformer | a weight for each training sequence | Python's own library as text, half of the sequences noise |
| `fewshot` | a convolutional network for each task | its initialization | characters drawn from fonts (matplotlib) |

The parts of the last one stand alone: `glyphs` draws the characters, `folders` reads Omniglot and CIFAR-FS, `imageset`
    is what both return,
`episodes` draws tasks from it, `conv4` is the network. `transformer` is that of `language`.
"""

from bilevel.problems import conv4 as conv4
from bilevel.problems import episodes as episodes
from bilevel.problems import fewshot as fewshot
from bilevel.problems import folders as folders
from bilevel.problems import glyphs as glyphs
from bilevel.problems import hypercleaning as hypercleaning
from bilevel.problems import imageset as imageset
from bilevel.problems import language as language
from bilevel.problems import quadratic as quadratic
from bilevel.problems import ridge as ridge
from bilevel.problems import transformer as transformer
