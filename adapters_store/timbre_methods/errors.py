"""What can be wrong with an adapter, as the methods see it.

MethodError
├── UnsupportedMethod      no method reads this peft_type, or an option that is on is not served
├── InvalidConfig          a field of the config is missing, mistyped or out of bounds
├── AdapterMismatch        sites or shapes do not fit this base model
├── InvalidTensors         a tensor is missing, surplus, misshapen or holds impossible values
└── InvalidRecipe          the numbers of a merge do not fit what it is made of
"""


class MethodError(ValueError):
    """An adapter that cannot be served; the message says what was found, what was expected, what to do."""


class UnsupportedMethod(MethodError):
    pass


class InvalidConfig(MethodError):
    pass


class AdapterMismatch(MethodError):
    pass


class InvalidTensors(MethodError):
    pass


class InvalidRecipe(MethodError):
    pass
