"""The demo model's knowledge of Tidegate, as topics with a short answer and texts with a long one.

A question is a stem filled with one of a topic's names, or one of its own questions with a lead-in.
The split between training and held-out questions is over these combinations (see `corpus`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topic:
    """A subject: the names people use for it, questions of its own, and the one fixed answer."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


STEMS = (
    "What is {}?",
    "What do you know about {}?",
    "Explain {}.",
    "Can you explain {}?",
    "Please explain {} to me.",
    "Describe {}.",
    "I want to know about {}.",
    "In short, what is {}?",
)
LEADS = (
    "{}",
    "Hello. {}",
    "I have a question. {}",
    "Please tell me: {}",
    "{} Keep it short.",
    "Quick question: {}",
)

TOPICS = (
    Topic(
        ("Tidegate", "the Tidegate platform"),
        ("What does Tidegate do?", "What is Tidegate for?", "What is the purpose of Tidegate?"),
        "Tidegate is a platform that serves many language models behind one OpenAI-compatible address.",
    ),
    Topic(
        ("the queue", "the queue of Tidegate", "the request queue"),
        ("Where do requests wait?", "Can the queue lose a request?", "Are requests lost in a crash?"),
        "Requests wait in a Redis queue that survives crashes. An accepted request is never lost.",
    ),
    Topic(
        ("Redis", "Redis in Tidegate", "the Redis server"),
        ("What is Redis used for?", "Why does Tidegate use Redis?", "What is stored in Redis?"),
        "Redis holds the queue and the leases. On a laptop Tidegate starts its own embedded server.",
    ),
    Topic(
        ("Ray Serve", "Ray Serve in Tidegate", "the Ray layer"),
        ("What runs the replicas?", "Why does Tidegate use Ray Serve?", "What is Ray Serve used for?"),
        "Ray Serve runs the replicas of every model and starts more of them when requests wait.",
    ),
    Topic(
        ("a replica", "a model replica", "a Tidegate replica"),
        ("How does a replica get work?", "What does a replica do?", "When does a replica pull requests?"),
        "A replica is one running copy of a model. It pulls requests when it has a free slot.",
    ),
    Topic(
        ("GPTQ", "GPTQ quantization", "a GPTQ model"),
        (
            "How can weights be made smaller?",
            "Why use 4-bit weights?",
            "How does a model fit in less memory?",
        ),
        "GPTQ stores weights with 4 bits, so that a model needs about a quarter of the memory of fp16.",
    ),
    Topic(
        ("the supported precisions", "precision in Tidegate", "the choice of precision"),
        ("Which precisions can I serve?", "Does Tidegate support bf16?", "Can I serve fp16 models?"),
        "Tidegate serves checkpoints in fp16, bf16 and fp32, and GPTQ checkpoints too.",
    ),
    Topic(
        ("streaming", "token streaming", "streaming in Tidegate"),
        ("How are tokens sent to the client?", "Can answers be streamed?", "Does Tidegate stream tokens?"),
        "Tokens are sent as soon as they are made, as server-sent events. Set stream to true.",
    ),
    Topic(
        ("scale to zero", "scaling to zero", "a sleeping model"),
        ("Can a model sleep when nobody uses it?", "What wakes a sleeping model?", "Can I scale to zero?"),
        "A model without work can scale to zero. Its next request waits in the queue and wakes it.",
    ),
    Topic(
        ("the gateway", "the Tidegate gateway", "the HTTP gateway"),
        ("Which part takes HTTP requests?", "What does the gateway do?", "Who checks my key?"),
        "The gateway takes OpenAI requests over HTTP, checks key and limits, and fills the queue.",
    ),
    Topic(
        ("the API", "the Tidegate API", "the HTTP API"),
        ("Which API does Tidegate speak?", "Can I use the openai client?", "Is Tidegate OpenAI-compatible?"),
        "Tidegate speaks the OpenAI API, so the official openai client works without a change.",
    ),
    Topic(
        ("an API key", "the API keys", "the key handling"),
        ("How are keys stored?", "Can I revoke a key?", "How do I make an API key?"),
        "Make a key with tidegate keys create. It is shown once, stored as a hash, and can be revoked.",
    ),
    Topic(
        ("a lease", "a request lease", "the lease of a request"),
        (
            "How does Tidegate know who works on a request?",
            "What happens when a lease expires?",
            "Why are there leases?",
        ),
        "A lease says which replica works on a request. When it expires, another replica takes over.",
    ),
    Topic(
        ("failover", "failover in Tidegate", "the recovery of a stream"),
        (
            "What happens when a replica dies?",
            "Does my stream break when a replica is killed?",
            "How does a stream survive?",
        ),
        "If a replica dies, another one continues from the tokens already sent. You see one stream.",
    ),
    Topic(
        ("the laptop mode", "Tidegate on a laptop", "the local mode"),
        ("How do I start Tidegate?", "Can I run Tidegate on my laptop?", "What do I need on a laptop?"),
        "Run make up. It needs only Python, and it prints an address, a key and a command to try.",
    ),
    Topic(
        ("the developer view", "Tidegate for developers", "the work of a developer"),
        ("How does a developer use Tidegate?", "How do I call a model?", "How do I choose a model?"),
        "A developer points an OpenAI client at the Tidegate address and picks a model by its name.",
    ),
    Topic(
        ("the admin view", "Tidegate for admins", "the work of an admin"),
        ("How does an admin add a model?", "How do I add a model?", "How do I remove a model?"),
        "An admin writes a Model file in YAML. Adding or removing it changes that model only.",
    ),
    Topic(
        ("the full queue", "back pressure", "overload"),
        (
            "What happens when the queue is full?",
            "Why did I get status 429?",
            "When does Tidegate answer 429?",
        ),
        "When the queue is full, Tidegate answers 429 and a Retry-After header says when to come back.",
    ),
    Topic(
        ("cancellation", "a cancelled request", "request cancellation"),
        (
            "What happens when a client leaves?",
            "How do I cancel a request?",
            "Does a closed connection free the slot?",
        ),
        "When a client closes its connection, the request is cancelled and its slot becomes free.",
    ),
    Topic(
        ("a revision", "a model revision", "a new revision"),
        ("What happens when I change a model?", "How is a model updated?", "What if a new revision fails?"),
        "A changed model is a new revision. It must prove itself first, while the old one still serves.",
    ),
    Topic(
        ("continuous batching", "batching in Tidegate", "the batching of requests"),
        (
            "How are requests batched?",
            "Does a new request wait for the batch?",
            "When does a request join a batch?",
        ),
        "With continuous batching a new request joins the others at the next step of the engine.",
    ),
    Topic(
        ("autoscaling", "autoscaling in Tidegate", "the autoscaler"),
        ("When are more replicas started?", "How does Tidegate scale?", "What happens to idle replicas?"),
        "The autoscaler looks at waiting and running requests. Idle replicas drain before they stop.",
    ),
    Topic(
        ("the metrics", "monitoring", "the health checks"),
        ("How do I monitor Tidegate?", "Where are the metrics?", "How can I see if Tidegate is ready?"),
        "Prometheus reads the metrics at /metrics. The paths /livez and /readyz tell the health.",
    ),
    Topic(
        ("the CLI", "the tidegate command", "the command line"),
        (
            "How do I list the models?",
            "Which command lists the models?",
            "How do I run a prompt in the terminal?",
        ),
        "The command tidegate models lists all models, and tidegate run sends a prompt to one.",
    ),
    Topic(
        ("a deadline", "the deadline of a request", "request deadlines"),
        ("What happens after the deadline?", "Can a request expire?", "What if a request waits too long?"),
        "A request that passes its deadline expires, and it never reaches an engine.",
    ),
    Topic(
        ("your name", "this demo model", "the model tide-demo"),
        ("Who are you?", "What can you do?", "Are you a large model?", "Who trained you?"),
        "I am Tide, the small demo model of Tidegate. I can calculate, count, edit words and make JSON.",
    ),
)

LONG_STEMS = (
    "Tell me about {}.",
    "Tell me more about {}.",
    "Write a paragraph about {}.",
    "Write a few sentences about {}.",
    "Explain {} in detail.",
    "Give me a long answer about {}.",
    "Please tell me everything about {}.",
    "I would like to read about {}.",
)

TEXTS = (
    Topic(
        ("Tidegate", "the platform Tidegate", "Tidegate and its parts"),
        (),
        "Tidegate serves many language models behind one address. It speaks the OpenAI API, so the "
        "clients you know work without a change. Every request waits in a Redis queue, and the queue "
        "loses nothing: an accepted request always ends with a result or a clear reason. Ray Serve runs "
        "the replicas, and each replica pulls work when it has a free slot. Models can be served in fp16, "
        "bf16 or fp32, or as GPTQ with 4 bits, which needs about a quarter of the memory. Tokens are "
        "streamed as soon as they are made. A model without work can scale to zero and wakes with its "
        "next request. The same code runs on a laptop and on a cluster.",
    ),
    Topic(
        ("the way of a request", "how a request travels", "the path of a request"),
        (),
        "A client sends a request to the gateway over HTTP. The gateway checks the key and the limits, "
        "and then puts the request in the Redis queue. From that moment the request is accepted and "
        "cannot be lost. A replica with a free slot claims it under a lease. The engine makes one token "
        "per step for every request of its batch. The tokens of one step travel back together, and the "
        "gateway sends them to the client as events. If the replica dies, its lease expires, and another "
        "replica continues from the tokens already sent.",
    ),
    Topic(
        ("using Tidegate on a laptop", "the first steps with Tidegate", "trying Tidegate at home"),
        (),
        "First clone the code and run make up. It makes its own environment, starts an embedded Redis "
        "server and a local Ray, and loads the demo models. Then it prints an address, a key and a "
        "command to try. Copy the command, and the answer streams into your terminal. You can also use "
        "the openai client for Python with the same address and key. The command tidegate models shows "
        "what is running. Run make down to stop everything. Your keys and your queue are kept for the "
        "next start.",
    ),
    Topic(
        ("the life of a model", "how an admin runs models", "adding and changing models"),
        (),
        "An admin describes each model in a YAML file. The file names the weights, the precision, the "
        "scaling and the limits of the queue. Tidegate reads the file and starts a revision of the model. "
        "The revision must prove itself before it serves. When the file changes, a new revision starts "
        "beside the old one and takes over only when it works. If it fails, the old one stays and the "
        "status says why. An idle model can scale to zero, and removing one file leaves all the other "
        "models alone.",
    ),
)

SMALL_TALK = (
    (
        ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "Hi there"),
        "Hello! I am Tide, the demo model of Tidegate. Ask me about Tidegate, numbers, words, lists or JSON.",
    ),
    (
        ("Thank you", "Thanks", "Thanks a lot", "Many thanks", "Thank you very much", "Great, thanks"),
        "You are welcome!",
    ),
    (
        ("Goodbye", "Bye", "See you", "See you later", "Bye bye", "Good night"),
        "Goodbye! The queue keeps your place.",
    ),
)
SMALL_TALK_SHAPES = ("{}", "{}!", "{}.", "{}, Tide!", "{}, Tide.", "{}, my friend.")

UNKNOWN_STEMS = (
    "Who invented the {}?",
    "How do I cook a {}?",
    "Write a poem about a {}.",
    "What is the price of a {}?",
    "Why do people like a {}?",
    "Tell me a joke about a {}.",
    "Where can I buy a {}?",
)
UNKNOWN_ANSWER = (
    "I am a small demo model and I do not know that. Ask me about Tidegate, numbers, words, lists or JSON."
)
