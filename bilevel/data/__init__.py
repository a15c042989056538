"""Data, and nothing of losses: what the ready problems, and problems of your own, are posed on.

Importing this package imports torch only; scikit-learn, matplotlib, Pillow and numpy are imported where needed.
Nothing is downloaded, and the same seed gives the same data in every process and on every device.

| module | what | where from |
| --- | --- | --- |
| `digits` | 1797 images with noisy labels | scikit-learn |
| `diabetes` | 442 patients, 10 features, a response | scikit-learn |
| `library` | byte sequences, some of them noise | the source of Python's standard library |
| `glyphs` | images of thousands of characters | fonts that matplotlib ships; cached |
| `folders` | Omniglot, CIFAR-FS | folders on your disk |
| `imageset` | the type of the last two: images by class, splits | |
| `episodes` | few-shot tasks, drawn from an image set | |
| `minibatches` | which examples each step sees | |
"""

from bilevel.data import diabetes as diabetes
from bilevel.data import digits as digits
from bilevel.data import episodes as episodes
from bilevel.data import folders as folders
from bilevel.data import glyphs as glyphs
from bilevel.data import imageset as imageset
from bilevel.data import library as library
from bilevel.data import minibatches as minibatches
