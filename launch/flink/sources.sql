-- Where everything comes from: the log in Kafka (format json), and profiles in PostgreSQL by change data capture.
-- ${KAFKA}: servers. ${OUT_OF_ORDER_S}: what comes later than this, in event time, is late for windows; at most 99. ${IDLE_S}: a
-- partition that is silent so long holds back no window; 0: it always does. POSTGRES_HOST and so on: the database.

CREATE TEMPORARY TABLE impressions (
  event_time_ms BIGINT,
  request_id BIGINT,
  user_id BIGINT,
  video_id BIGINT,
  author_id BIGINT,
  sound_id BIGINT,
  tag_id ARRAY<BIGINT>,
  duration_ms BIGINT,
  topic STRING NOT NULL METADATA VIRTUAL,
  log_partition INT NOT NULL METADATA FROM 'partition' VIRTUAL,
  log_offset BIGINT NOT NULL METADATA FROM 'offset' VIRTUAL,
  sent TIMESTAMP_LTZ(3) NOT NULL METADATA FROM 'timestamp' VIRTUAL,
  -- One whose clock is an hour ahead would close every window: it is left out, as one without time, user or video is.
  is_event AS (
    user_id IS NOT NULL AND video_id IS NOT NULL
    AND event_time_ms BETWEEN 0 AND 4102444800000 AND TO_TIMESTAMP_LTZ(event_time_ms, 3) <= sent + INTERVAL '1' HOUR
  ) IS TRUE,
  -- What is left out moves no watermark.
  event_time AS CASE
    WHEN event_time_ms BETWEEN 0 AND 4102444800000 AND TO_TIMESTAMP_LTZ(event_time_ms, 3) <= sent + INTERVAL '1' HOUR
    THEN TO_TIMESTAMP_LTZ(event_time_ms, 3) ELSE TO_TIMESTAMP_LTZ(0, 3) END,
  WATERMARK FOR event_time AS event_time - INTERVAL '${OUT_OF_ORDER_S}' SECOND
) WITH (
  'connector' = 'kafka',
  'topic' = 'impressions',
  'properties.bootstrap.servers' = '${KAFKA}',
  'scan.startup.mode' = 'earliest-offset',
  'scan.watermark.idle-timeout' = '${IDLE_S} s',
  'format' = 'json',
  'json.ignore-parse-errors' = 'true'
);

CREATE TEMPORARY TABLE actions (
  event_time_ms BIGINT,
  request_id BIGINT,
  user_id BIGINT,
  video_id BIGINT,
  action STRING,
  `value` BIGINT,
  event_id BIGINT,
  topic STRING NOT NULL METADATA VIRTUAL,
  log_partition INT NOT NULL METADATA FROM 'partition' VIRTUAL,
  log_offset BIGINT NOT NULL METADATA FROM 'offset' VIRTUAL,
  sent TIMESTAMP_LTZ(3) NOT NULL METADATA FROM 'timestamp' VIRTUAL,
  is_event AS (
    user_id IS NOT NULL AND video_id IS NOT NULL AND action IS NOT NULL
    AND event_time_ms BETWEEN 0 AND 4102444800000 AND TO_TIMESTAMP_LTZ(event_time_ms, 3) <= sent + INTERVAL '1' HOUR
  ) IS TRUE,
  event_time AS CASE
    WHEN event_time_ms BETWEEN 0 AND 4102444800000 AND TO_TIMESTAMP_LTZ(event_time_ms, 3) <= sent + INTERVAL '1' HOUR
    THEN TO_TIMESTAMP_LTZ(event_time_ms, 3) ELSE TO_TIMESTAMP_LTZ(0, 3) END,
  WATERMARK FOR event_time AS event_time - INTERVAL '${OUT_OF_ORDER_S}' SECOND
) WITH (
  'connector' = 'kafka',
  'topic' = 'actions',
  'properties.bootstrap.servers' = '${KAFKA}',
  'scan.startup.mode' = 'earliest-offset',
  'scan.watermark.idle-timeout' = '${IDLE_S} s',
  'format' = 'json',
  'json.ignore-parse-errors' = 'true'
);

-- The publications are made by hand, see README.md, and hold these two tables only.
CREATE TEMPORARY TABLE user_profiles (
  user_id BIGINT NOT NULL,
  country STRING,
  `language` STRING,
  age BIGINT,
  changed TIMESTAMP_LTZ(3) NOT NULL METADATA FROM 'op_ts' VIRTUAL,
  kind STRING NOT NULL METADATA FROM 'row_kind' VIRTUAL,
  PRIMARY KEY (user_id) NOT ENFORCED
) WITH (
  'connector' = 'postgres-cdc',
  'hostname' = '${POSTGRES_HOST}',
  'port' = '${POSTGRES_PORT}',
  'username' = '${POSTGRES_USER}',
  'password' = '${POSTGRES_PASSWORD}',
  'database-name' = '${POSTGRES_DATABASE}',
  'schema-name' = 'public',
  'table-name' = 'user_profiles',
  'slot.name' = 'flink_user_profiles',
  'decoding.plugin.name' = 'pgoutput',
  'debezium.publication.name' = 'flink_user_profiles',
  'debezium.publication.autocreate.mode' = 'filtered',
  'scan.incremental.snapshot.enabled' = 'true',
  'scan.read-changelog-as-append-only.enabled' = 'true'
);

CREATE TEMPORARY TABLE video_profiles (
  video_id BIGINT NOT NULL,
  author_id BIGINT,
  sound_id BIGINT,
  tag_id STRING,  -- bigint[] in PostgreSQL: the connector knows no arrays, and gives one as text: [1, 2]
  duration_ms BIGINT,
  quality DOUBLE,
  changed TIMESTAMP_LTZ(3) NOT NULL METADATA FROM 'op_ts' VIRTUAL,
  kind STRING NOT NULL METADATA FROM 'row_kind' VIRTUAL,
  PRIMARY KEY (video_id) NOT ENFORCED
) WITH (
  'connector' = 'postgres-cdc',
  'hostname' = '${POSTGRES_HOST}',
  'port' = '${POSTGRES_PORT}',
  'username' = '${POSTGRES_USER}',
  'password' = '${POSTGRES_PASSWORD}',
  'database-name' = '${POSTGRES_DATABASE}',
  'schema-name' = 'public',
  'table-name' = 'video_profiles',
  'slot.name' = 'flink_video_profiles',
  'decoding.plugin.name' = 'pgoutput',
  'debezium.publication.name' = 'flink_video_profiles',
  'debezium.publication.autocreate.mode' = 'filtered',
  'scan.incremental.snapshot.enabled' = 'true',
  'scan.read-changelog-as-append-only.enabled' = 'true'
);

-- A row of the first reading has no time of its own: it counts from ${SNAPSHOT_MS} on, Unix ms, a moment before the job was
-- submitted. So changes that come after it are later, and it is later than whatever an earlier job has left in the lake.
CREATE TEMPORARY VIEW user_profile_changes AS
SELECT
  user_id, country, `language`, age, kind,
  CASE WHEN changed <= TO_TIMESTAMP_LTZ(0, 3) THEN ${SNAPSHOT_MS}
    ELSE UNIX_TIMESTAMP(DATE_FORMAT(changed, 'yyyy-MM-dd HH:mm:ss')) * 1000 + EXTRACT(MILLISECOND FROM changed) END AS changed_ms
FROM user_profiles
WHERE kind <> '-U';

CREATE TEMPORARY VIEW video_profile_changes AS
SELECT
  video_id, author_id, sound_id, CAST(JSON_QUERY(tag_id, '$' RETURNING ARRAY<STRING>) AS ARRAY<BIGINT>) AS tag_id, duration_ms,
  quality, kind,
  CASE WHEN changed <= TO_TIMESTAMP_LTZ(0, 3) THEN ${SNAPSHOT_MS}
    ELSE UNIX_TIMESTAMP(DATE_FORMAT(changed, 'yyyy-MM-dd HH:mm:ss')) * 1000 + EXTRACT(MILLISECOND FROM changed) END AS changed_ms
FROM video_profiles
WHERE kind <> '-U';
