"""A few kilobytes of text to train the twins' tokenizers on: prose, code, chat, some Unicode."""

from typing import Final

CORPUS: Final = """\
The harbour was quiet in the early morning. A small boat came in from the sea with its lamps still
burning, and two people on the quay waited to take the rope. They had been waiting since four.
"You are late," said the older one. "The wind was against us," came the answer, "and then there
was no wind at all." They carried the boxes up the steps, one after another, and counted them.

A converter reads the names, the shapes and the types of the tensors before it reads any weights.
When a tensor is missing, or when its shape is not the one that the architecture asks for, there is
nothing to be gained by going on. The weights of each layer are then read, changed and written in
order, so that the memory needed does not grow with the size of the model.

What is the capital of France? The capital of France is Paris.
Please describe the picture. There is a red square on the left and a blue circle on the right.
How many apples are on the table? There are three green apples and one yellow pear on the table.
Write a function that adds two numbers. Explain what the function returns when both are zero.

def add(left: int, right: int) -> int:
    \"\"\"Return the sum of the two numbers.\"\"\"
    return left + right

for index in range(10):
    if index % 2 == 0:
        print(index, add(index, 1))

{"name": "layer", "values": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "shape": [128, 64], "done": true}

1234567890 3.14159 2.71828 100% 50/50 (a) [b] {c} <d> e@f.g #h $i ^j &k *l ~m `n` |o| \\p "q" 'r'
Grüße aus Köln. Ça va très bien, merci. El niño comió mañana.
你好,世界。 こんにちは世界。 Привет, мир.

It was the third day of rain. The river had come over the lower field, and the path to the mill was
under water. Nobody had seen the miller since the morning before, but smoke was rising from his
chimney, so there was no need to worry. "He has flour enough for a year," the baker said, "and he
has never liked company." The children thought this was very funny and told it to everyone they met.
The user asks a question, the assistant answers, and the system message says how it should be done.
"""
