"""Order without memory: keyed permutations that are computed, never stored."""

import hashlib

import numpy as np

ROUNDS = 8


def derive_keys(*parts: object) -> np.ndarray:
    """uint64 [ROUNDS] from anything with a stable text form."""
    text = "/".join(str(part) for part in parts)
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * ROUNDS), "<u8")


class Permutation:
    """A bijection of 0..size-1, fixed by a key.

    A Feistel network over pairs (left, right) of a x b >= size, whose rounds add a keyed hash of one half to the
    other modulo its range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel);
    results outside the range are sent through again until they fall inside ("cycle walking").
    """

    def __init__(self, size: int, *key: object) -> None:
        """A permutation of `size` numbers; the key is anything with a stable text form."""
        assert 1 <= size < 2**62
        self.size = size
        self._keys = derive_keys(*key)
        self._left = int(np.ceil(np.sqrt(size)))
        self._right = -(-size // self._left)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Images of int64 numbers of any shape."""
        numbers = np.asarray(numbers, np.int64)
        assert not numbers.size or (numbers.min() >= 0 and numbers.max() < self.size)
        images = self._network(numbers.astype(np.uint64).ravel())
        outside = np.flatnonzero(images >= self.size)
        while outside.size:
            images[outside] = self._network(images[outside])
            outside = outside[images[outside] >= self.size]
        return images.astype(np.int64).reshape(numbers.shape)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, np.uint64(self._right))
        for round_number, key in enumerate(self._keys):
            if round_number % 2 == 0:
                left = (left + _mix(right ^ key) % np.uint64(self._left)) % np.uint64(self._left)
            else:
                right = (right + _mix(left ^ key) % np.uint64(self._right)) % np.uint64(self._right)
        return left * np.uint64(self._right) + right


def uniform(places: np.ndarray, *key: object) -> np.ndarray:
    """Numbers in [0, 1), one for each of some places (integers from 0), fixed by it and the key."""
    keys = derive_keys(*key)
    hashed = _mix(_mix(np.asarray(places).astype(np.uint64) ^ keys[0]) ^ keys[1])
    return (hashed >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
