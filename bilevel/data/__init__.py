"""Data, and nothing of losses: what the ready problems, and problems of your own, are posed on.

Importing this package imports torch only; scikit-learn, matplotlib, Pillow, numpy and mnist1d are imported where
needed. Nothing is downloaded, and the same seed gives the same data in every process and on every device.

| module | what | where from |
| --- | --- | --- |
| `digits` | 1797 images with noisy labels | scikit-learn |
| `diabetes` | 442 patients, 10 features, a response | scikit-learn |
| `library` | byte sequences, some of them noise | the source of Python's standard library |
| `glyphs` | images of thousands of characters | fonts that matplotlib ships; cached |
| `mnist1d` | 10 digits as signals of 40 points | made by the package mnist1d |
| `folders` | Omniglot, CIFAR-FS, any images | folders on your disk |
| `pickled` | FC100, miniImageNet | pickles of arrays, or images with lists, on your disk |
| `imageset` | images by class, splits: what all images come as | |
| `classset` | examples of any kind by class: `ClassSet`, `DatasetClasses` | arrays, a torch Dataset |
| `classes` | what the two above share; `disjoint`: splits share no class | |
| `episodes` | few-shot tasks, drawn from any of these: `Episodes` | |
| `sinusoids`, `randomnets` | regression tasks: `Sinusoids`, `RandomNets` | drawn by seed |
| `stream` | what loaders of tasks share: positions, resuming, pools | |
| `prefetched` | `Prefetched`: the next batches are made by a thread | |
| `minibatches` | which examples each step sees | |
"""

from bilevel.data import classes as classes
from bilevel.data import classset as classset
from bilevel.data import diabetes as diabetes
from bilevel.data import digits as digits
from bilevel.data import episodes as episodes
from bilevel.data import folders as folders
from bilevel.data import glyphs as glyphs
from bilevel.data import imageset as imageset
from bilevel.data import library as library
from bilevel.data import minibatches as minibatches
from bilevel.data import mnist1d as mnist1d
from bilevel.data import pickled as pickled
from bilevel.data import prefetched as prefetched
from bilevel.data import randomnets as randomnets
from bilevel.data import sinusoids as sinusoids
from bilevel.data import stream as stream
from bilevel.data.classes import Classes as Classes
from bilevel.data.classes import disjoint as disjoint
from bilevel.data.classset import ClassSet as ClassSet
from bilevel.data.classset import DatasetClasses as DatasetClasses
from bilevel.data.episodes import Episodes as Episodes
from bilevel.data.imageset import ImageSet as ImageSet
from bilevel.data.prefetched import Prefetched as Prefetched
from bilevel.data.randomnets import RandomNets as RandomNets
from bilevel.data.sinusoids import Sinusoids as Sinusoids
from bilevel.data.stream import TaskStream as TaskStream
